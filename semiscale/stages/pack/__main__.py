"""Run the pack stage from a shell: `python -m semiscale.stages.pack`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.stage import pack

if __name__ == "__main__":
    sys.exit(run_from_cli(PackConfig, pack))
