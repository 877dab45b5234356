"""Count the device-hours of a run against its budget."""

import os
import time
from pathlib import Path

from semiscale.observability.task_status import TaskStatus

BUDGET_POLL_INTERVAL_S = 60.0  # grows with the number of tasks


def billed_devices() -> int:
    """Count this task's devices, under torchrun those of all ranks. Without a GPU the pod is what is paid for."""
    return max(1, int(os.environ.get("WORLD_SIZE", count_gpus())))


def count_gpus() -> int:
    """Count the GPUs of this machine or container by their device files; torch takes seconds to import."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


class BudgetUsage:
    """Device-seconds that a run's tasks had used at one look, and how fast they go on: no pod has to look often.

    The task that looks is at work, also where its object does not say so yet.
    """

    def __init__(self, tasks: list[TaskStatus] | None = None, own: TaskStatus | None = None) -> None:
        self._looked = time.monotonic()
        self._known = tasks is not None
        self.device_s = sum(task.device_s for task in tasks or [])
        running = {task.task: task.devices for task in tasks or [] if task.state == "running"}
        self._per_s = sum((running | ({own.task: own.devices} if own else {})).values())
        self._every_s = BUDGET_POLL_INTERVAL_S * (1 + len(tasks or []) // 20)

    def may_exceed(self, budget_s: float) -> bool:
        """Return whether the budget may be used up, or the last check is too old."""
        return not self._known or self.left_s(budget_s) <= 0 or time.monotonic() - self._looked >= self._every_s

    def left_s(self, budget_s: float) -> float:
        """Return the seconds in which those that were at work use up the budget."""
        left = budget_s - self.device_s
        return left / max(self._per_s, 1e-9) - (time.monotonic() - self._looked)
