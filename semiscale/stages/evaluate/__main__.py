"""Run the evaluate stage from a shell: `python -m semiscale.stages.evaluate`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.stages.evaluate.stage import evaluate

if __name__ == "__main__":
    sys.exit(run_from_cli(EvaluateConfig, evaluate))
