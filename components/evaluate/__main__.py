"""`python -m components.evaluate`: the stage from a shell."""

import sys

from components.evaluate.evaluate import EvaluateConfig, evaluate
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(EvaluateConfig, evaluate))
