"""`python -m components.train`: the stage from a shell."""

import sys

from components.shared.stage import command_line
from components.train.train import TrainConfig, train

if __name__ == "__main__":
    sys.exit(command_line(TrainConfig, train))
