"""What every task says of itself in the object store: `<workdir>/progress/<run>/<task>.json`, small and overwritten.

`watch` reads these objects, and so does every task of a run that has a budget. A task is written by the process that
does it: a pod that takes over from a dead one goes on in the same object. A store that does not answer is said once
and never fails the task.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from semiscale import storage
from semiscale.common.errors import BudgetExceededError, InvalidInputError, SemiscaleError
from semiscale.common.signals import TerminatedError, graceful_stop
from semiscale.common.text import to_single_line
from semiscale.observability.budget import BudgetUsage, billed_devices
from semiscale.observability.progress import Progress, log_info
from semiscale.observability.task_status import RunStatusStore, TaskStatus

HEARTBEAT_INTERVAL_S = 10.0


MIN_POLL_INTERVAL_S = 1.0  # as often as that a task looks whose run is about to have spent its budget


HEARTBEAT_TIMEOUT_S = 3 * HEARTBEAT_INTERVAL_S  # an object that was written since then has a process that lives


# Kubeflow Pipelines' number of a pod's try: 0 is the first, also of a run that a person retries.
RETRY_INDEX_ENV = "KFP_RETRY_INDEX"


def fail_fast_on_retry(board: RunStatusStore, task: str) -> None:
    """Raise InvalidInputError with the line of the try before this one, where that refused the task.

    Kubeflow starts a pod again whatever its exit code is: bad input would be read as often as a node may be lost.
    """
    if os.environ.get(RETRY_INDEX_ENV, "0") == "0":
        return
    before = None
    with suppress(OSError, SemiscaleError, ValueError):  # the stage itself says what is wrong with the store
        before = TaskStatus.model_validate_json(storage.read_bytes(board.uri(task)))
    if before and before.exit_code == InvalidInputError.exit_code:
        raise InvalidInputError(before.reason)


@contextmanager
def report_status(
    board: RunStatusStore, task: str, stage: str, on_device: bool = False, budget_hours: float = 0.0
) -> Iterator[None]:
    """Keep a task's object up to date while its work runs, and end it with how that went.

    Turns SIGTERM into TerminatedError. Raises BudgetExceededError where the run's tasks have used up its
    device-hours, after stopping
    the work as SIGTERM would.
    """
    reporter = _StatusReporter(board, task, stage, billed_devices() if on_device else 0, budget_hours)
    with graceful_stop():
        try:
            reporter.start()
            yield
        except BaseException as error:
            reporter.end(error)
            if reporter.over_budget:
                raise BudgetExceededError(reporter.over_budget) from None
            raise
        reporter.end(None)


class _StatusReporter:
    """Writes one task's object from a thread of its own, and watches the budget where there is one."""

    def __init__(self, board: RunStatusStore, task: str, stage: str, devices: int, budget_hours: float) -> None:
        now = time.time()
        self._board, self._budget_s = board, budget_hours * 3600
        self._task = TaskStatus(
            task=task,
            stage=stage,
            pod=socket.gethostname(),
            process=os.getpid(),
            state="running",
            started=now,
            updated=now,
            devices=devices,
        )
        self._before_s = 0.0  # device-seconds of the pods that did this task before, in this try of the run
        self._spending = BudgetUsage()
        self._over = threading.Event()
        self._silent = False
        self.over_budget = ""
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="progress")

    def start(self) -> None:
        """Begin. With a budget the first look comes before the work: a run that spent it begins nothing more."""
        if self._budget_s and self._task.devices:
            self._quietly(self._look)
            if self.over_budget:
                raise TerminatedError(self.over_budget)
        self._thread.start()

    def end(self, error: BaseException | None) -> None:
        """Write how it ended."""
        self._over.set()
        if self._thread.ident:
            self._thread.join(HEARTBEAT_INTERVAL_S)
        self._quietly(lambda: self._write(_final_fields(error, self.over_budget)))

    def _keep_up(self) -> None:
        if not (self._budget_s and self._task.devices):
            self._quietly(self._carry_over)
        while True:
            self._quietly(lambda: self._write({}))
            if self._budget_s and self._task.devices and self._spending.may_exceed(self._budget_s):
                self._quietly(self._look)
                if self.over_budget and not self._over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            if self._over.wait(self._pause_s()):
                return

    def _pause_s(self) -> float:
        """Return the time to the next write: shorter where the budget may be used up before it."""
        left_s = (
            self._spending.left_s(self._budget_s) if self._budget_s and self._task.devices else HEARTBEAT_INTERVAL_S
        )
        return min(HEARTBEAT_INTERVAL_S, max(left_s, MIN_POLL_INTERVAL_S))

    def _carry_over(self, tasks: list[TaskStatus] | None = None) -> None:
        found = self._board.current_tasks() if tasks is None else tasks
        self._before_s = next((task.device_s for task in found if task.task == self._task.task), 0.0)

    def _look(self) -> None:
        tasks = self._board.current_tasks()
        if not self._thread.ident:
            self._carry_over(tasks)
        self._spending = BudgetUsage(tasks, self._task)
        if self._spending.device_s >= self._budget_s:
            self.over_budget = (
                f"budget_hours: {self._spending.device_s / 3600:.2f} of {self._budget_s / 3600:g} device-hours are "
                "spent; what was finished is kept, set more and run it again to go on"
            )

    def _write(self, ending: dict[str, object]) -> None:
        now = time.time()
        spent = self._before_s + (now - self._task.started) * self._task.devices
        fields: dict[str, object] = {"updated": now, "device_s": round(spent, 1), **ending}
        if latest := Progress.latest:
            fields |= {"done": latest.done, "total": latest.total, "unit": latest.unit, "detail": latest.detail}
            fields["per_s"] = round(latest.rate(), 3)
        elif other := self._of_another_process():
            if not ending and now - other.updated < HEARTBEAT_TIMEOUT_S:
                return  # a rank that this process started, on this machine or another, speaks for both
            fields |= other.model_dump(include={"done", "total", "unit", "detail", "per_s"})
            fields["device_s"] = max(round(spent, 1), other.device_s)
        task = self._task.model_copy(update=fields)
        storage.write_bytes(self._board.uri(task.task), task.model_dump_json().encode())

    def _of_another_process(self) -> TaskStatus | None:
        data = storage.read_or_none(self._board.uri(self._task.task))
        found = TaskStatus.model_validate_json(data) if data else None
        mine = (self._task.pod, self._task.process)
        return found if found and (found.pod, found.process) != mine and found.started >= self._task.started else None

    def _quietly(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever the store does, the work goes on
            if not self._silent:
                log_info(self._task.stage, f"progress cannot be stored, the work goes on: {error}")
            self._silent = True


def _final_fields(error: BaseException | None, over_budget: str) -> dict[str, object]:
    if error is None:
        return {"state": "finished"}
    if over_budget:
        return {"state": "stopped", "reason": over_budget, "exit_code": BudgetExceededError.exit_code}
    reason = to_single_line(str(error)) or type(error).__name__
    code = error.exit_code if isinstance(error, SemiscaleError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    return {"state": "stopped" if code > 128 else "failed", "reason": reason, "exit_code": code}
