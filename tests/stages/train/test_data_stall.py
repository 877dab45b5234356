"""Test which waits for data count as a stall.

The device is a simulated asynchronous one, or a CPU.
"""

import time
from collections.abc import Iterator

import pytest
import torch

from semiscale.stages.train.data_stall import DataStallTimer, data_stall_timer


class Device:
    """A simulated device that works through its queue. The host's clock is `now`."""

    def __init__(self) -> None:
        self.now, self.busy_until = 0.0, 0.0

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def record_event(self) -> "SimulatedEvent":
        return SimulatedEvent(self)

    def batches(self, *waits_s: float) -> Iterator[None]:
        """Yield batches after waits of so many seconds."""
        for wait_s in waits_s:
            self.now += wait_s
            yield None


class SimulatedEvent:
    """An event that is complete when the device has done the work queued before it."""

    def __init__(self, device: Device) -> None:
        self.device, self.at_s = device, max(device.now, device.busy_until)

    def is_complete(self) -> bool:
        return self.device.now >= self.at_s

    def seconds_since(self, earlier: "SimulatedEvent", /) -> float:
        assert self.is_complete(), "elapsed_time of an event that the device has not reached is an error"
        return self.at_s - earlier.at_s


@pytest.mark.parametrize(
    ("step_s", "host_s", "wait_s", "counted_s"),
    [
        # The device works for longer than the wait.
        (10.0, 0.0, 3.0, 0.0),
        # The device becomes idle in the middle of the wait.
        (1.0, 0.0, 3.0, 2.0),
        # The device is idle before the wait, while the host does other work. That time does not count.
        (1.0, 2.0, 3.0, 3.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_a_wait_counts_while_the_device_is_idle(step_s: float, host_s: float, wait_s: float, counted_s: float) -> None:
    device = Device()
    timer = DataStallTimer(device.record_event, lambda: device.now)
    batches = device.batches(0.5, wait_s)
    timer.next_batch(batches)
    device.work(step_s)
    timer.record_step_end()
    assert timer.take_stall_seconds() == 0.5, "before the first step all of it counts"
    device.now += host_s
    timer.next_batch(batches)
    device.now += 100
    assert timer.take_stall_seconds() == counted_s
    assert timer.take_stall_seconds() == 0.0, "once"


def test_a_stall_is_not_known_until_the_device_reaches_its_events() -> None:
    device = Device()
    timer = DataStallTimer(device.record_event, lambda: device.now)
    batches = device.batches(0.0, 1.0, 1.0)
    stalls_s = []
    for _ in range(3):
        timer.next_batch(batches)
        device.work(1.5)
        timer.record_step_end()
        stalls_s.append(timer.take_stall_seconds())
    device.now = 100.0
    assert (stalls_s, timer.take_stall_seconds()) == ([0.0, 0.0, 0.0], 0.0)


def test_every_wait_counts_on_a_cpu() -> None:
    def slow_batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    timer, batches = data_stall_timer(torch.device("cpu")), slow_batches()
    for number in range(3):
        assert timer.next_batch(batches) == number
        timer.record_step_end()
    assert 0.15 <= timer.take_stall_seconds() < 60, "seconds"
