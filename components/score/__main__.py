"""`python -m components.score`: the stage from a shell."""

import sys

from components.score.score import ScoreConfig, score
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(ScoreConfig, score))
