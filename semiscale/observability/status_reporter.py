"""Report the status of a task, and stop the task when the run's budget is used up.

`watch` reads the status objects, and so does every task of a run that has a budget. The process that runs a task writes
its object. A pod that replaces a dead one continues with the same object.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from semiscale import storage
from semiscale.common.errors import (
    AbandonedError,
    BudgetExceededError,
    InvalidInputError,
    SemiscaleError,
    split_error_id,
)
from semiscale.common.signals import TerminatedError, graceful_stop
from semiscale.common.text import to_single_line
from semiscale.observability.budget import BudgetUsage, billed_devices
from semiscale.observability.progress import Progress, log_info
from semiscale.observability.task_status import RunStatusStore, TaskStatus

HEARTBEAT_INTERVAL_S = 10.0
# A task checks the budget at most this often. It does so when the budget is nearly used up.
MIN_POLL_INTERVAL_S = 1.0
# The process of a status object counts as alive for this time after its last write.
HEARTBEAT_TIMEOUT_S = 3 * HEARTBEAT_INTERVAL_S
# Kubeflow Pipelines sets the number of a pod's attempt. It is 0 for the first attempt, also after a person retries the
# run.
RETRY_INDEX_ENV = "KFP_RETRY_INDEX"


def fail_fast_on_retry(status_store: RunStatusStore, task: str) -> None:
    """Refuse a task if its previous attempt was refused.

    Kubeflow restarts a failed pod for every exit code. Without this check each attempt would read the bad input again.

    Args:
        status_store: Status objects of the run.
        task: Name of the task.

    Raises:
        InvalidInputError: The previous attempt was refused. The error has the message and the id of that attempt.
    """
    if os.environ.get(RETRY_INDEX_ENV, "0") == "0":
        return
    previous = None
    # The stage itself reports an error of the store.
    with suppress(OSError, SemiscaleError, ValueError):
        previous = TaskStatus.model_validate_json(storage.read_bytes(status_store.uri(task)))
    if previous and previous.exit_code == InvalidInputError.exit_code:
        code, message = split_error_id(previous.reason)
        raise InvalidInputError(code, message)


@contextmanager
def report_status(
    status_store: RunStatusStore, task: str, stage: str, on_device: bool = False, budget_hours: float = 0.0
) -> Iterator[None]:
    """Keep a task's status object up to date while its work runs.

    SIGTERM becomes TerminatedError. A store that fails is logged once and never fails the task.

    Args:
        status_store: Status objects of the run.
        task: Name of the task.
        stage: Name of its stage.
        on_device: Whether the task uses devices that count for the budget.
        budget_hours: Device-hours of the run, or 0 if there is no budget.

    Raises:
        BudgetExceededError: The run's tasks have used up the budget. The work is stopped first, as by SIGTERM.
        TerminatedError: SIGTERM stopped the task.
    """
    now = time.time()
    status = TaskStatus(
        task=task,
        stage=stage,
        pod=socket.gethostname(),
        process=os.getpid(),
        state="running",
        started=now,
        updated=now,
        devices=billed_devices() if on_device else 0,
    )
    writer = _StatusWriter(status_store, status)
    budget = _BudgetWatcher(status_store, status, budget_hours * 3600)
    ended = threading.Event()
    thread = threading.Thread(target=_report_until, args=(ended, writer, budget), daemon=True, name="status reporter")
    error: BaseException | None = None
    with graceful_stop():
        try:
            # Check the budget before the work starts, because it may be used up already.
            if budget.is_active:
                writer.run_safely(lambda: writer.resume_from(budget.check()))
                if budget.exceeded:
                    raise TerminatedError("SEMI-E003", budget.exceeded)
            thread.start()
            yield
        except BaseException as raised:
            error = raised
            if budget.exceeded:
                raise BudgetExceededError("SEMI-E003", budget.exceeded) from None
            raise
        finally:
            ended.set()
            if thread.ident:
                thread.join(HEARTBEAT_INTERVAL_S)
            writer.run_safely(lambda: writer.write(_final_fields(error, budget.exceeded)))


def _report_until(ended: threading.Event, writer: "_StatusWriter", budget: "_BudgetWatcher") -> None:
    """Write the status object and check the budget until the work has ended."""
    if not budget.is_active:
        writer.run_safely(writer.resume)
    while True:
        writer.run_safely(lambda: writer.write({}))
        if budget.is_due():
            writer.run_safely(budget.check)
            if budget.exceeded and not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return
        if ended.wait(budget.pause_s()):
            return


class _StatusWriter:
    """Writes the status object of one task."""

    def __init__(self, status_store: RunStatusStore, task: TaskStatus) -> None:
        self._status_store, self._task = status_store, task
        # Device-seconds that earlier pods of this attempt spent on the task.
        self._earlier_device_s = 0.0
        self._has_logged_error = False

    def resume(self) -> None:
        """List the run's tasks, and call `resume_from`."""
        self.resume_from(self._status_store.current_tasks())

    def resume_from(self, tasks: list[TaskStatus]) -> None:
        """Count the device-seconds that earlier pods spent on this task.

        Args:
            tasks: Tasks of the run.
        """
        self._earlier_device_s = next((task.device_s for task in tasks if task.task == self._task.task), 0.0)

    def write(self, final_fields: dict[str, object]) -> None:
        """Write the status object.

        Args:
            final_fields: Fields of a task that has ended. They are empty while the work runs.
        """
        now = time.time()
        spent = self._earlier_device_s + (now - self._task.started) * self._task.devices
        fields: dict[str, object] = {"updated": now, "device_s": round(spent, 1), **final_fields}
        if latest := Progress.latest:
            fields |= {"done": latest.done, "total": latest.total, "unit": latest.unit, "detail": latest.detail}
            fields["per_s"] = round(latest.rate(), 3)
        elif other := self._read_other_process():
            # Rank 0, which this process started, reports for both processes while it is alive.
            if not final_fields and now - other.updated < HEARTBEAT_TIMEOUT_S:
                return
            fields |= other.model_dump(include={"done", "total", "unit", "detail", "per_s"})
            fields["device_s"] = max(round(spent, 1), other.device_s)
        task = self._task.model_copy(update=fields)
        storage.write_bytes(self._status_store.uri(task.task), task.model_dump_json().encode())

    def run_safely(self, action: Callable[[], object]) -> None:
        """Run an action on the store. Log its first error and ignore later ones."""
        try:
            action()
        # The work must continue after any error of the store.
        except Exception as error:  # noqa: BLE001
            if not self._has_logged_error:
                log_info(self._task.stage, f"progress cannot be stored, the work goes on: {error}")
            self._has_logged_error = True

    def _read_other_process(self) -> TaskStatus | None:
        """Return the status that another process has written since this one started."""
        data = storage.read_or_none(self._status_store.uri(self._task.task))
        other = TaskStatus.model_validate_json(data) if data else None
        own = (self._task.pod, self._task.process)
        return other if other and (other.pod, other.process) != own and other.started >= self._task.started else None


class _BudgetWatcher:
    """Compares the device-hours of a run with its budget.

    It is inactive if the run has no budget or the task has no devices.
    """

    def __init__(self, status_store: RunStatusStore, task: TaskStatus, budget_s: float) -> None:
        self._status_store, self._task, self._budget_s = status_store, task, budget_s
        self._usage = BudgetUsage()
        self.is_active = bool(budget_s and task.devices)
        # The message of the error, or "" until the budget is used up.
        self.exceeded = ""

    def is_due(self) -> bool:
        """Return whether the budget must be checked now."""
        return self.is_active and self._usage.may_exceed(self._budget_s)

    def check(self) -> list[TaskStatus]:
        """Add up the device-seconds of the run's tasks, and return the tasks.

        Cost:
            The requests of `RunStatusStore.current_tasks`.
        """
        tasks = self._status_store.current_tasks()
        self._usage = BudgetUsage(tasks, self._task)
        if self._usage.device_s >= self._budget_s:
            self.exceeded = (
                f"budget_hours: {self._usage.device_s / 3600:.2f} of {self._budget_s / 3600:g} device-hours are "
                "spent. Finished work is kept. Raise budget_hours and run it again to continue."
            )
        return tasks

    def pause_s(self) -> float:
        """Return the seconds to the next write.

        The next write comes earlier if the budget may be used up before.
        """
        left_s = self._usage.left_s(self._budget_s) if self.is_active else HEARTBEAT_INTERVAL_S
        return min(HEARTBEAT_INTERVAL_S, max(left_s, MIN_POLL_INTERVAL_S))


def _final_fields(error: BaseException | None, over_budget: str) -> dict[str, object]:
    """Return the fields of the status object of a task that has ended.

    Args:
        error: Error that ended the task, or None.
        over_budget: Message of a budget that is used up, or "".
    """
    if error is None:
        return {"state": "finished"}
    if over_budget:
        reason = str(BudgetExceededError("SEMI-E003", over_budget))
        return {"state": "stopped", "reason": reason, "exit_code": BudgetExceededError.exit_code}
    reason = to_single_line(str(error)) or type(error).__name__
    code = error.exit_code if isinstance(error, SemiscaleError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    is_stopped = code > 128 or isinstance(error, AbandonedError)
    return {"state": "stopped" if is_stopped else "failed", "reason": reason, "exit_code": code}
