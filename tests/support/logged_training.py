"""Run the training stage with faults, and log the keys of every step.

The options are those of the stage. The environment has five more settings:

WINDOW_BYTES   the size of the shuffle buffer
KEYS           the folder of the logs
KILLED_AT      the step in which a rank is killed
BROKEN_AT      the step in which the inputs of the last rank are not finite
TERMINATED_IN  the validation in which the last rank receives SIGTERM
"""

import json
import os
import runpy
import signal
from pathlib import Path

from torch import Tensor

from semiscale.common.signals import GracefulStop
from semiscale.stages.train.input_pipeline import dataset
from semiscale.stages.train.input_pipeline.device_loader import DeviceBatch
from semiscale.stages.train.train_step import TrainStep
from semiscale.stages.train.trainer import Trainer

STEP, VALIDATE, STOP = TrainStep.all_reduce_step, Trainer._all_reduce_validate, GracefulStop.raise_now


def log_and_step(self: TrainStep, batch: DeviceBatch, rate: float, step: int) -> Tensor:
    """Log the keys of a step and run it, or be killed in it."""
    if step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    with (Path(os.environ["KEYS"]) / f"{self._ranks.rank}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "keys": batch.keys}) + "\n")
    if step == int(os.environ["BROKEN_AT"]) and self._ranks.rank == self._ranks.count - 1:
        normalise = self._normalize
        self._normalize = lambda pixels: normalise(pixels) * float("nan")  # type: ignore[assignment]
    return STEP(self, batch, rate, step)


def terminate_and_validate(self: Trainer) -> bool:
    """Send SIGTERM to the last rank while rank 0 validates, and validate."""
    last = self._ranks.rank == self._ranks.count - 1
    if last and len(self.curve) * 10 == int(os.environ["TERMINATED_IN"]) * min(self._steps, 100):
        os.kill(os.getpid(), signal.SIGTERM)
    return VALIDATE(self)


def count_checkpoints_and_stop(self: GracefulStop) -> None:
    """Write the number of checkpoints at the stop of a rank, and stop."""
    keys = Path(os.environ["KEYS"])
    (keys / f"stopped-{os.environ['RANK']}").write_text(str(len(list(keys.parent.rglob("checkpoints/*.json")))))
    STOP(self)


if __name__ == "__main__":
    vars(dataset)["SHUFFLE_BUFFER_BYTES"] = int(os.environ["WINDOW_BYTES"])
    TrainStep.all_reduce_step = log_and_step  # type: ignore[method-assign]
    Trainer._all_reduce_validate = terminate_and_validate  # type: ignore[method-assign]
    GracefulStop.raise_now = count_checkpoints_and_stop  # type: ignore[method-assign]
    runpy.run_module("semiscale.stages.train", run_name="__main__")
