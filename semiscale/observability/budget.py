"""Count the device-hours of a run against its budget."""

import os
import time
from pathlib import Path

from semiscale.observability.task_status import TaskStatus

# The interval of a run with few tasks. It grows with the number of tasks.
BUDGET_POLL_INTERVAL_S = 60.0


def billed_devices() -> int:
    """Return the number of devices that this task pays for.

    Under torchrun the devices of all ranks count. A pod without a GPU counts as one device.
    """
    return max(1, int(os.environ.get("WORLD_SIZE", count_gpus())))


def count_gpus() -> int:
    """Count the GPUs of this machine or container.

    It counts their device files, because importing torch takes seconds.
    """
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


class BudgetUsage:
    """The device-seconds of a run's tasks at one check, and their rate of use.

    The rate tells when the budget may be used up, so that pods need not check often.

    Args:
        tasks: Tasks of the run, or None before the first check.
        own: Task that checks. It counts as running, even if its status object does not say so yet.
    """

    def __init__(self, tasks: list[TaskStatus] | None = None, own: TaskStatus | None = None) -> None:
        self._checked_at = time.monotonic()
        self._is_checked = tasks is not None
        self.device_s = sum(task.device_s for task in tasks or [])
        running = {task.task: task.devices for task in tasks or [] if task.state == "running"}
        self._running_devices = sum((running | ({own.task: own.devices} if own else {})).values())
        # A check reads the status objects of all tasks, so a run with many tasks checks less often.
        self._poll_interval_s = BUDGET_POLL_INTERVAL_S * (1 + len(tasks or []) // 20)

    def may_exceed(self, budget_s: float) -> bool:
        """Return whether the budget may be used up, or the last check is too old."""
        is_old = time.monotonic() - self._checked_at >= self._poll_interval_s
        return not self._is_checked or self.left_s(budget_s) <= 0 or is_old

    def left_s(self, budget_s: float) -> float:
        """Return the seconds until the running tasks have used up the budget.

        Args:
            budget_s: Budget of the run in device-seconds.
        """
        left_device_s = budget_s - self.device_s
        return left_device_s / max(self._running_devices, 1e-9) - (time.monotonic() - self._checked_at)
