"""The training stage with a small window, whose ranks write down the keys of every step: for tests of real processes.

WINDOW_BYTES, KEYS, a folder, KILLED_AT, the step that a rank dies in, BROKEN_AT, the step in which what the last rank's
network sees is no numbers, and TOLD_IN, the validation that it is told to stop in, come from the environment; the rest
are the stage's own options.
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

STEP, VALIDATED, STOP = TrainStep.all_reduce_step, Trainer._all_reduce_validate, GracefulStop.raise_now


def logged(self: TrainStep, batch: DeviceBatch, rate: float, step: int) -> Tensor:
    """Write a line for a step, and make it, or die in it."""
    if step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    with (Path(os.environ["KEYS"]) / f"{self._ranks.rank}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "keys": batch.keys}) + "\n")
    if step == int(os.environ["BROKEN_AT"]) and self._ranks.rank == self._ranks.count - 1:
        normalise = self._normalize
        self._normalize = lambda pixels: normalise(pixels) * float("nan")  # type: ignore[assignment]
    return STEP(self, batch, rate, step)


def told(self: Trainer) -> bool:
    """Be told to stop, where rank 0 validates and this one waits."""
    last = self._ranks.rank == self._ranks.count - 1
    if last and len(self.curve) * 10 == int(os.environ["TOLD_IN"]) * min(self._steps, 100):
        os.kill(os.getpid(), signal.SIGTERM)
    return VALIDATED(self)


def stopped(self: GracefulStop) -> None:
    """Note how many checkpoints there are in the folder beside KEYS when a rank stops."""
    keys = Path(os.environ["KEYS"])
    (keys / f"stopped-{os.environ['RANK']}").write_text(str(len(list(keys.parent.rglob("checkpoints/*.json")))))
    STOP(self)


if __name__ == "__main__":
    vars(dataset)["SHUFFLE_BUFFER_BYTES"] = int(os.environ["WINDOW_BYTES"])
    TrainStep.all_reduce_step = logged  # type: ignore[method-assign]
    Trainer._all_reduce_validate = told  # type: ignore[method-assign]
    GracefulStop.raise_now = stopped  # type: ignore[method-assign]
    runpy.run_module("semiscale.stages.train", run_name="__main__")
