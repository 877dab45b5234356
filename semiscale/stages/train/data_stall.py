"""Measure how long the device of a training is idle and waits for a batch."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

Batch = TypeVar("Batch")


class DeviceEvent(Protocol):
    """A point in a device's queue of work.

    Its time is taken when the device reaches it.
    """

    def is_complete(self) -> bool:
        """Return whether the device has reached the event, without waiting for it."""

    def seconds_since(self, earlier: Any, /) -> float:
        """Return the device's seconds since an earlier event. Both are complete."""


class DataStallTimer:
    """Measure the data stalls of one training.

    A GPU runs asynchronously. While the host waits for a batch, the device may still compute the step before, and then
    no time is lost. The stall is the wait, but at most the time from the end of the last step to the arrival of the
    batch. That time is measured by the device's own clock. It becomes known later, and nothing waits for it.

    Args:
        record_event: Records an event at the end of the device's queue.
        clock: Returns the host's seconds. Tests replace it.
    """

    def __init__(self, record_event: Callable[[], DeviceEvent], clock: Callable[[], float] = time.monotonic) -> None:
        self._record_event, self._clock = record_event, clock
        self._step_end: DeviceEvent | None = None
        # Waits whose stall is not known yet: seconds, end of the step before, arrival of the batch.
        self._pending: deque[tuple[float, DeviceEvent, DeviceEvent]] = deque()
        self._known_stall_s = 0.0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, and measure the wait for it."""
        started = self._clock()
        batch = next(batches)
        wait_s = self._clock() - started
        # Before the first step the device is idle, so the whole wait counts.
        if self._step_end is None:
            self._known_stall_s += wait_s
        else:
            self._pending.append((wait_s, self._step_end, self._record_event()))
        return batch

    def record_step_end(self) -> None:
        """Record the end of a step, after all of its work has been queued on the device."""
        self._step_end = self._record_event()

    def take_stall_seconds(self) -> float:
        """Return the stall in seconds that has become known since the last call."""
        while self._pending and self._pending[0][2].is_complete():
            wait_s, step_end, arrival = self._pending.popleft()
            self._known_stall_s += min(wait_s, arrival.seconds_since(step_end))
        stall_s, self._known_stall_s = self._known_stall_s, 0.0
        return stall_s


class HostEvent:
    """An event on a CPU. Work there is synchronous, so the event is complete at once."""

    def __init__(self) -> None:
        self.at_s = time.monotonic()

    def is_complete(self) -> bool:
        """Return True."""
        return True

    def seconds_since(self, earlier: "HostEvent", /) -> float:
        """Return the seconds from an earlier event to this one."""
        return self.at_s - earlier.at_s


class CudaEvent:
    """An event in a GPU's current stream.

    That stream waits for the copy of each batch, as the network does.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def is_complete(self) -> bool:
        """Return whether the GPU has reached the event, without waiting for it."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: "CudaEvent", /) -> float:
        """Return the GPU's seconds from an earlier event to this one."""
        return float(earlier._event.elapsed_time(self._event)) / 1000


def data_stall_timer(device: torch.device) -> DataStallTimer:
    """Return a timer for the data stalls of this device."""
    return DataStallTimer(CudaEvent if device.type == "cuda" else HostEvent)
