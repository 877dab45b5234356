"""Batches on the device, one ahead of the network: on a GPU, copied from pinned memory beside its work."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.shared import models
from components.shared.receipts import Preprocessing
from components.train.data import TrainingBatch


class DeviceBatch(NamedTuple):
    """One rank's part of a batch, where it is worked on; pixels as uint8, a quarter of the bytes to move."""

    images_BHWC: Tensor
    labels_B: Tensor
    keys: list[str]


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
