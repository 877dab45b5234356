"""`python -m components.train`: the stage from a shell, or one rank of it, started by torchrun."""

import os
import sys

from components.shared.stage import command_line
from components.train.ranks import end_with_the_launcher, of_environment, started_by_torchrun
from components.train.train import TrainConfig, train

if __name__ == "__main__":
    if started_by_torchrun():
        end_with_the_launcher()
    if not of_environment().first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends: rank 0 speaks for all
    sys.exit(command_line(TrainConfig, train, prints=not started_by_torchrun()))
