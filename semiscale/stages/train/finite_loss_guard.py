"""Stop a training whose loss is not finite, and name the images of the batch."""

import json
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.stages.train.distributed import DistributedContext

# Steps from one check to the next. A check on a GPU waits for the device, so it is made less often there.
FINITE_CHECK_INTERVAL = {"cpu": 1, "cuda": 16}
MAX_KEYS_IN_MESSAGE = 10


class _StepRecord(NamedTuple):
    """One step, as it is written to the file of a non-finite loss."""

    step: int
    rate: float
    keys: list[str]


class FiniteLossGuard:
    """Remember the first step whose loss is not finite.

    This does not wait for the device.

    Args:
        name: Name of the training in messages.
        folder: URI of the training's folder, where the keys of the bad batch are written.
        batch_size: Images of a global batch.
        steps: Steps of the whole training.
        device: Device of the losses.
        ranks: This process among those of the training.
    """

    def __init__(
        self, name: str, folder: str, batch_size: int, steps: int, device: torch.device, ranks: DistributedContext
    ) -> None:
        self._name, self._folder, self._batch_size, self._steps = name, folder, batch_size, steps
        self._ranks = ranks
        self._interval = FINITE_CHECK_INTERVAL[device.type]
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), device=device)
        self._recent: deque[_StepRecord] = deque(maxlen=max(FINITE_CHECK_INTERVAL.values()))

    def record(self, step: int, rate: float, keys: list[str], loss: Tensor) -> None:
        """Record the loss of a step and the keys of its images.

        Args:
            step: Number of the step, from 1.
            rate: Learning rate of the step.
            keys: Keys of this rank's images.
            loss: Scalar on the device.
        """
        is_first_bad = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self._bad_loss = torch.where(is_first_bad, loss, self._bad_loss)
        self._recent.append(_StepRecord(step, rate, keys))

    def is_check_due(self, step: int) -> bool:
        """Return whether the regular check falls on this step."""
        return step % self._interval == 0

    def all_reduce_check(self) -> None:
        """Check the losses of all ranks.

        This is an all-reduce, so every rank must call it.

        Raises:
            SemiscaleError: The loss of a step is not finite on some rank.
        """
        self._raise_if_bad(self._ranks.all_reduce_min(self._first_bad_step()))

    def check_this_rank(self) -> None:
        """Check the losses of this rank alone.

        Raises:
            SemiscaleError: The loss of a step is not finite.
        """
        self._raise_if_bad(self._first_bad_step())

    def _first_bad_step(self) -> int:
        """Return the first bad step of this rank, or a number above all steps."""
        return int(self._bad_step.item()) or self._steps + 1

    def _raise_if_bad(self, bad_step: int) -> None:
        if bad_step > self._steps:
            return
        # Only the rank that failed first reports its images. The others fail one step later, because their weights are
        # no longer finite.
        if self._first_bad_step() != bad_step:
            raise SemiscaleError(
                "SEMI-E234",
                f"train: {self._name}: The loss of step {bad_step:,} on another rank is not finite. "
                "See that rank's log.",
            )
        record = next(record for record in self._recent if record.step == bad_step)
        uri = storage.join(self._folder, f"not-finite-{bad_step:09}-{self._ranks.rank}.json")
        storage.write_bytes(uri, json.dumps(record._asdict(), indent=1).encode())
        num_hidden = len(record.keys) - MAX_KEYS_IN_MESSAGE
        hidden = f" and {num_hidden} more (see {uri})" if num_hidden > 0 else ""
        raise SemiscaleError(
            "SEMI-E233",
            f"train: {self._name}: the loss is {self._bad_loss.item()} after {bad_step * self._batch_size:,} images "
            f"(step {bad_step:,}, learning rate {record.rate:g}). Lower the learning rate, or look at the batch: "
            f"{', '.join(record.keys[:MAX_KEYS_IN_MESSAGE])}{hidden}",
        )
