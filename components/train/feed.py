"""Batches on the device, one ahead of the network: on a GPU, copied from pinned memory beside its work.

For a GPU they are read and decoded in a process of its own, so that nothing holds up the thread that launches kernels.
"""

from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.shared import models
from components.shared.beside import Beside, Line, Slots, listen
from components.shared.receipts import Preprocessing
from components.train.data import TrainingBatch, TrainingData

SLOTS = 3  # batches: one that is being copied to the device, one that is there to be, and one that is being made


class DeviceBatch(NamedTuple):
    """One rank's part of a batch, where it is worked on; pixels as uint8, a quarter of the bytes to move."""

    images_BHWC: Tensor
    labels_B: Tensor
    keys: list[str]


def fed(data: TrainingData, batch_size: int, steps: int, after: int, device: torch.device) -> Iterator[DeviceBatch]:
    """Bring this rank's part of the batches of steps `after` to `steps` to a device.

    Raises SemiscaleError where an image cannot be read any more, or, with a GPU, the process that reads was lost.
    """
    if device.type == "cuda":
        return on_device(made_beside(data, batch_size, steps, after), device)
    return on_device(data.batches(batch_size, steps, after), device)


def made_beside(data: TrainingData, batch_size: int, steps: int, after: int) -> Iterator[TrainingBatch]:
    """Begin another process that makes what `data.batches` does. Pixels are there until the next batch is asked for.

    Memory: SLOTS batches, and in that process what `data` holds and 0.3 GB of libraries.
    """
    slots = Slots(SLOTS, data.shape(batch_size))
    return _received(
        Beside("reads and decodes training images", _make, data, batch_size, steps, after, slots), slots, steps - after
    )


def _received(beside: Beside, slots: Slots, batches: int) -> Iterator[TrainingBatch]:
    try:
        for _ in range(batches):
            slot, labels_B, keys = beside.receive()
            yield TrainingBatch(slots.pixels_SBHWC[slot], labels_B, keys)
            with suppress(OSError):  # where it is gone, there is no batch to be made, or `receive` says so
                beside.send(slot)
    finally:
        beside.close()


def _make(line: Line, data: TrainingData, batch_size: int, steps: int, after: int, slots: Slots) -> None:
    """Make batches, in the other process, into slots that are free."""
    free: SimpleQueue[int] = SimpleQueue()
    for slot in range(SLOTS):
        free.put(slot)
    listen(line, free.put)
    for batch in data.batches(batch_size, steps, after):
        slot = free.get()
        slots.pixels_SBHWC[slot] = batch.images_BHWC
        line.send((slot, batch.labels_B, batch.keys))


def on_device(batches: Iterator[TrainingBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Bring batches to a device. On a GPU the next one is on its way while the caller works on this one."""
    if device.type != "cuda":
        for batch in batches:
            yield DeviceBatch(torch.from_numpy(batch.images_BHWC), torch.from_numpy(batch.labels_B), batch.keys)
        return
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[DeviceBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(beside):
            copied = DeviceBatch(_moved(batch.images_BHWC, device), _moved(batch.labels_B, device), batch.keys)
        arriving = (copied, beside.record_event())
        if ahead:
            yield _arrived(*ahead)
        ahead = arriving
    if ahead:
        yield _arrived(*ahead)


def _moved(array: NDArray[np.uint8] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def _arrived(batch: DeviceBatch, copied: torch.cuda.Event) -> DeviceBatch:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in (batch.images_BHWC, batch.labels_B):
        tensor.record_stream(current)  # its memory is not given away while this stream reads it
    return batch


class Normalise:
    """Pixels to what a network takes, the same as models.normalised, with constants that are on the device already."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing = preprocessing
        self._mean, self._std = models.constants(preprocessing, device)

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        return (models.channels_first(images_BHWC, self._preprocessing).float() / 255 - self._mean) / self._std
