"""Run `python -m semiscale.stages.train`: the stage from a shell, or one rank of it under torchrun."""

import os
import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import distributed_context_from_env, exit_with_launcher, is_under_torchrun
from semiscale.stages.train.stage import train

if __name__ == "__main__":
    if is_under_torchrun():
        exit_with_launcher()
    if not distributed_context_from_env().is_main:
        # Only rank 0 logs. The file stays open until the process ends.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.exit(run_from_cli(TrainConfig, train, prints=not is_under_torchrun()))
