"""`python -m semiscale.stages.merge`: the stage from a shell."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.merge.stage import MergeConfig, merge

if __name__ == "__main__":
    sys.exit(run_from_cli(MergeConfig, merge))
