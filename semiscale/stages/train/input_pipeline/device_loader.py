"""Bring the batches of a training to its device.

On a GPU the next batch is copied from pinned memory while the network works on the current one. The batches are read
and decoded in a worker process then, so that nothing delays the thread that launches kernels.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semiscale.common.worker_process import Channel, SharedBatchBuffer, WorkerProcess, start_receiver
from semiscale.stages.train.input_pipeline.dataset import TrainDataset, TrainingBatch

# One batch is being copied to the device, one is ready, and one is being prepared.
NUM_BUFFERS = 3


class DeviceBatch(NamedTuple):
    """One rank's part of a batch on its device.

    Attributes:
        images_BHWC: Pixels as uint8, a quarter of the bytes of float32.
        labels_B: Numbers of the classes.
        keys: Keys of the samples.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    keys: list[str]


def device_batches(
    data: TrainDataset, batch_size: int, steps: int, after: int, device: torch.device
) -> Iterator[DeviceBatch]:
    """Yield this rank's part of each batch on a device.

    Args:
        data: The training set.
        batch_size: Images of a batch, over all ranks.
        steps: Last step.
        after: Step after which the batches begin.
        device: Device of the network.

    Raises:
        SemiscaleError: A sample cannot be read, or the worker process of a GPU ended.
    """
    if device.type == "cuda":
        return prefetch_to_device(batches_from_worker(data, batch_size, steps, after), device)
    return prefetch_to_device(data.batches(batch_size, steps, after), device)


def batches_from_worker(data: TrainDataset, batch_size: int, steps: int, after: int) -> Generator[TrainingBatch]:
    """Yield what `data.batches` does, made in a worker process. The process starts at once.

    Args:
        data: The training set.
        batch_size: Images of a batch, over all ranks.
        steps: Last step.
        after: Step after which the batches begin.

    Yields:
        Batches. The pixels of one are valid until the next one is requested.

    Cost:
        Memory for NUM_BUFFERS batches. The process holds what `data` does, and 0.3 GB of libraries.
    """
    slots = SharedBatchBuffer(NUM_BUFFERS, data.shape(batch_size))
    worker = WorkerProcess("reads and decodes training images", _make_batches, data, batch_size, steps, after, slots)
    return _receive_batches(worker, slots, steps - after)


def _receive_batches(worker: WorkerProcess, slots: SharedBatchBuffer, count: int) -> Generator[TrainingBatch]:
    try:
        for _ in range(count):
            slot, labels_B, keys = worker.receive()
            yield TrainingBatch(slots.pixels_SBHWC[slot], labels_B, keys)
            # If the process has ended, the next `receive` reports it.
            with suppress(OSError):
                worker.send(slot)
    finally:
        worker.close()


def _make_batches(
    channel: Channel, data: TrainDataset, batch_size: int, steps: int, after: int, slots: SharedBatchBuffer
) -> None:
    """Run the worker process. It writes batches into free slots."""
    free_slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(NUM_BUFFERS):
        free_slots.put(slot)
    start_receiver(channel, free_slots.put)
    with closing(data.batches(batch_size, steps, after)) as batches:
        for batch in batches:
            slot = free_slots.get()
            slots.pixels_SBHWC[slot] = batch.images_BHWC
            channel.send((slot, batch.labels_B, batch.keys))


def prefetch_to_device(batches: Generator[TrainingBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """Yield batches on a device. On a GPU the next one is copied while the caller works on one.

    Args:
        batches: Batches in memory. They are closed with this iterator.
        device: Device of the network.
    """
    with closing(batches):
        if device.type != "cuda":
            for batch in batches:
                yield DeviceBatch(torch.from_numpy(batch.images_BHWC), torch.from_numpy(batch.labels_B), batch.keys)
            return
        copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        previous: tuple[DeviceBatch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(copy_stream):
                copy = DeviceBatch(
                    _copy_to_device(batch.images_BHWC, device), _copy_to_device(batch.labels_B, device), batch.keys
                )
            copied = copy_stream.record_event()
            if previous:
                yield _wait_for_copy(*previous)
            previous = (copy, copied)
        if previous:
            yield _wait_for_copy(*previous)


def _copy_to_device(array: NDArray[np.uint8] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def _wait_for_copy(batch: DeviceBatch, copied: torch.cuda.Event) -> DeviceBatch:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    # The allocator must not reuse the memory while the current stream reads it.
    for tensor in (batch.images_BHWC, batch.labels_B):
        tensor.record_stream(current)
    return batch
