"""How long a training's device had nothing to do because the next batch was not there."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

Batch = TypeVar("Batch")


class DeviceEvent(Protocol):
    """A moment in a device's work: its clock is read when the device gets there."""

    def is_complete(self) -> bool:
        """Say whether the device has got there; does not wait for it."""

    def seconds_since(self, earlier: Any, /) -> float:
        """Return the device's seconds from an earlier mark of its kind to this one, which it has passed."""


class DataStallTimer:
    """Counts the waits for data of one training.

    The host runs ahead of a GPU: while it waits for a batch the device may be at work on the step before, and then
    nothing is lost. What counts of a wait is at most what lies, by the device's own clock, between the end of the last
    step and the arrival of the batch. That is known when the device has got there; nothing waits for it before.
    """

    def __init__(self, mark: Callable[[], DeviceEvent], clock: Callable[[], float] = time.monotonic) -> None:
        self._mark, self._clock = mark, clock
        self._ended: DeviceEvent | None = None
        self._open: deque[tuple[float, DeviceEvent, DeviceEvent]] = deque()
        self._settled_s = 0.0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch."""
        started = self._clock()
        batch = next(batches)
        waited_s = self._clock() - started
        if self._ended is None:  # before the first step the device has no work
            self._settled_s += waited_s
        else:
            self._open.append((waited_s, self._ended, self._mark()))
        return batch

    def step_submitted(self) -> None:
        """Note that all work of a step has been given to the device."""
        self._ended = self._mark()

    def take_stall_seconds(self) -> float:
        """Return the seconds of waiting that have become known since they were last asked for."""
        while self._open and self._open[0][2].is_complete():
            waited_s, ended, arrived = self._open.popleft()
            self._settled_s += min(waited_s, arrived.seconds_since(ended))
        settled_s, self._settled_s = self._settled_s, 0.0
        return settled_s


class HostEvent:
    """On a CPU, who gives the work does it: a mark is passed when it is made."""

    def __init__(self) -> None:
        self.at_s = time.monotonic()

    def is_complete(self) -> bool:
        """Say yes."""
        return True

    def seconds_since(self, earlier: "HostEvent", /) -> float:
        """Return the seconds between."""
        return self.at_s - earlier.at_s


class CudaEvent:
    """An event in a GPU's stream, which waits for the copy of a batch as the network does."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def is_complete(self) -> bool:
        """Ask the GPU, without waiting."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: "CudaEvent", /) -> float:
        """Return the GPU's seconds between."""
        return float(earlier._event.elapsed_time(self._event)) / 1000


def data_stall_timer(device: torch.device) -> DataStallTimer:
    """Return a count of the waits of this device."""
    return DataStallTimer(CudaEvent if device.type == "cuda" else HostEvent)
