"""The training stage with a small window, whose ranks write down the keys of every step: for tests of real processes.

WINDOW_BYTES, KEYS, a folder, and KILLED_AT, the step that a rank dies in, come from the environment; the rest are the
stage's own options.
"""

import json
import os
import runpy
import signal
from pathlib import Path

from torch import Tensor

from components.train import data
from components.train.feed import DeviceBatch
from components.train.loop import Training

STEP = Training._step


def logged(self: Training, batch: DeviceBatch, rate: float, step: int) -> Tensor:
    """Write a line for a step, and make it, or die in it."""
    if step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    with (Path(os.environ["KEYS"]) / f"{self._ranks.rank}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "keys": batch.keys}) + "\n")
    return STEP(self, batch, rate, step)


if __name__ == "__main__":
    vars(data)["WINDOW_BYTES"] = int(os.environ["WINDOW_BYTES"])
    Training._step = logged  # type: ignore[method-assign]
    runpy.run_module("components.train", run_name="__main__")
