"""Run the score stage from a shell: `python -m semiscale.stages.score`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.stage import score

if __name__ == "__main__":
    sys.exit(run_from_cli(ScoreConfig, score))
