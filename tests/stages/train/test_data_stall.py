"""What counts as waiting for data, over a device that works through its steps beside the host, and over this one."""

import time
from collections.abc import Iterator

import pytest
import torch

from semiscale.stages.train.data_stall import DataStallTimer, data_stall_timer


class Device:
    """A device that works off what it is given; the host's clock is `now`."""

    def __init__(self) -> None:
        self.now, self.busy_until = 0.0, 0.0

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def mark(self) -> "DeviceMark":
        return DeviceMark(self)

    def batches(self, *waits_s: float) -> Iterator[None]:
        """Batches that let the host wait."""
        for wait_s in waits_s:
            self.now += wait_s
            yield None


class DeviceMark:
    """Is passed when the device has done what it was given before."""

    def __init__(self, device: Device) -> None:
        self.device, self.at_s = device, max(device.now, device.busy_until)

    def is_complete(self) -> bool:
        return self.device.now >= self.at_s

    def seconds_since(self, earlier: "DeviceMark", /) -> float:
        assert self.is_complete(), "elapsed_time of an event that the device has not reached is an error"
        return self.at_s - earlier.at_s


@pytest.mark.parametrize(
    ("step_s", "host_s", "wait_s", "counted_s"),
    [
        (10.0, 0.0, 3.0, 0.0),  # the device is at work for longer than the batch takes
        (1.0, 0.0, 3.0, 2.0),  # it ends in the middle of the wait
        (1.0, 2.0, 3.0, 3.0),  # it had ended before: the host did something else, which is no waiting for data
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_a_wait_counts_from_when_the_device_has_nothing_to_do(
    step_s: float, host_s: float, wait_s: float, counted_s: float
) -> None:
    device = Device()
    waiting = DataStallTimer(device.mark, lambda: device.now)
    batches = device.batches(0.5, wait_s)
    waiting.next_batch(batches)
    device.work(step_s)
    waiting.record_step_end()
    assert waiting.take_stall_seconds() == 0.5, "before the first step all of it counts"
    device.now += host_s
    waiting.next_batch(batches)
    device.now += 100
    assert waiting.take_stall_seconds() == counted_s
    assert waiting.take_stall_seconds() == 0.0, "once"


def test_what_the_device_has_not_reached_is_told_later() -> None:
    device = Device()
    waiting = DataStallTimer(device.mark, lambda: device.now)
    batches = device.batches(0.0, 1.0, 1.0)
    told = []
    for _ in range(3):
        waiting.next_batch(batches)
        device.work(1.5)
        waiting.record_step_end()
        told.append(waiting.take_stall_seconds())
    device.now = 100.0
    assert (told, waiting.take_stall_seconds()) == ([0.0, 0.0, 0.0], 0.0)


def test_on_a_cpu_every_wait_counts() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    waiting, batches = data_stall_timer(torch.device("cpu")), slow()
    for number in range(3):
        assert waiting.next_batch(batches) == number
        waiting.record_step_end()
    assert 0.15 <= waiting.take_stall_seconds() < 60, "seconds"
