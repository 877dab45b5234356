"""Run the merge stage from a shell: `python -m semiscale.stages.merge`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.merge.stage import MergeConfig, merge

if __name__ == "__main__":
    sys.exit(run_from_cli(MergeConfig, merge))
