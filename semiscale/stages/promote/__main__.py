"""Run the promote stage from a shell: `python -m semiscale.stages.promote`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.promote.stage import PromoteConfig, promote

if __name__ == "__main__":
    sys.exit(run_from_cli(PromoteConfig, promote))
