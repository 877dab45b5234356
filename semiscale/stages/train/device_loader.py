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

from semiscale.common.worker_process import Channel, SharedBatchBuffer, WorkerProcess, start_receiver
from semiscale.stages.train.dataset import TrainDataset, TrainingBatch

NUM_BUFFERS = 3  # batches: one that is being copied to the device, one that is there to be, and one that is being made


class DeviceBatch(NamedTuple):
    """One rank's part of a batch, where it is worked on; pixels as uint8, a quarter of the bytes to move."""

    images_BHWC: Tensor
    labels_B: Tensor
    keys: list[str]


def device_batches(
    data: TrainDataset, batch_size: int, steps: int, after: int, device: torch.device
) -> Iterator[DeviceBatch]:
    """Bring this rank's part of the batches of steps `after` to `steps` to a device.

    Raises SemiscaleError where an image cannot be read any more, or, with a GPU, the process that reads was lost.
    """
    if device.type == "cuda":
        return prefetch_to_device(batches_from_worker(data, batch_size, steps, after), device)
    return prefetch_to_device(data.batches(batch_size, steps, after), device)


def batches_from_worker(data: TrainDataset, batch_size: int, steps: int, after: int) -> Iterator[TrainingBatch]:
    """Begin another process that makes what `data.batches` does. Pixels are there until the next batch is asked for.

    Memory: SLOTS batches, and in that process what `data` holds and 0.3 GB of libraries.
    """
    slots = SharedBatchBuffer(NUM_BUFFERS, data.shape(batch_size))
    return _received(
        WorkerProcess("reads and decodes training images", _make, data, batch_size, steps, after, slots),
        slots,
        steps - after,
    )


def _received(beside: WorkerProcess, slots: SharedBatchBuffer, batches: int) -> Iterator[TrainingBatch]:
    try:
        for _ in range(batches):
            slot, labels_B, keys = beside.receive()
            yield TrainingBatch(slots.pixels_SBHWC[slot], labels_B, keys)
            with suppress(OSError):  # where it is gone, there is no batch to be made, or `receive` says so
                beside.send(slot)
    finally:
        beside.close()


def _make(line: Channel, data: TrainDataset, batch_size: int, steps: int, after: int, slots: SharedBatchBuffer) -> None:
    """Make batches, in the other process, into slots that are free."""
    free: SimpleQueue[int] = SimpleQueue()
    for slot in range(NUM_BUFFERS):
        free.put(slot)
    start_receiver(line, free.put)
    for batch in data.batches(batch_size, steps, after):
        slot = free.get()
        slots.pixels_SBHWC[slot] = batch.images_BHWC
        line.send((slot, batch.labels_B, batch.keys))


def prefetch_to_device(batches: Iterator[TrainingBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Bring batches to a device. On a GPU the next one is on its way while the caller works on this one."""
    if device.type != "cuda":
        for batch in batches:
            yield DeviceBatch(torch.from_numpy(batch.images_BHWC), torch.from_numpy(batch.labels_B), batch.keys)
        return
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[DeviceBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(beside):
            copied = DeviceBatch(_to_device(batch.images_BHWC, device), _to_device(batch.labels_B, device), batch.keys)
        arriving = (copied, beside.record_event())
        if ahead:
            yield _wait_for_copy(*ahead)
        ahead = arriving
    if ahead:
        yield _wait_for_copy(*ahead)


def _to_device(array: NDArray[np.uint8] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def _wait_for_copy(batch: DeviceBatch, copied: torch.cuda.Event) -> DeviceBatch:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in (batch.images_BHWC, batch.labels_B):
        tensor.record_stream(current)  # its memory is not given away while this stream reads it
    return batch
