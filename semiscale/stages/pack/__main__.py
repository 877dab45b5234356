"""`python -m semiscale.stages.pack`: the stage from a shell."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.stage import pack

if __name__ == "__main__":
    sys.exit(run_from_cli(PackConfig, pack))
