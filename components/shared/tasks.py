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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from components.shared import storage
from components.shared.errors import BudgetSpent, Refused, SemiscaleError
from components.shared.progress import Progress, say
from components.shared.receipts import Document
from components.shared.stopping import Stopped, stopping_on_sigterm
from components.shared.wording import one_line

WRITE_EVERY_S = 10.0
LOOK_AGAIN_S = 1.0  # as often as that a task looks whose run is about to have spent its budget
READ_EVERY_S = 60.0  # of the other tasks, for the budget; twenty times that where there are hundreds of them
FRESH_S = 3 * WRITE_EVERY_S  # an object that was written since then has a process that lives
READERS = 32
# Kubeflow Pipelines' number of a pod's try: 0 is the first, also of a run that a person retries.
RETRY = "KFP_RETRY_INDEX"
FIRST = "plan"  # the task that every run begins with: what is older than its start is of an earlier try
SUBMITTED: Final = "submitted"  # the object that says that a try was asked for; whether it begins, its plan decides


class Task(Document):
    """One task of a run. Times are seconds since 1970; `device_s` includes what dead pods had spent on it."""

    task: str
    stage: str
    pod: str
    process: int = 0
    state: Literal["submitted", "running", "finished", "failed", "stopped"]
    started: float
    updated: float
    done: int = 0
    total: int = 0
    unit: str = "images"
    per_s: float = 0.0
    detail: str = ""
    devices: int = 0
    device_s: float = 0.0
    reason: str = ""
    exit_code: int = 0


class Board:
    """All tasks of one run. What has not changed since the last look is not read again.

    A look costs one listing and a read of every object that changed: at most all tasks, a few hundred.
    """

    def __init__(self, workdir: str, run: str) -> None:
        self.folder = storage.join(workdir, "progress", run)
        self._known: dict[str, tuple[str, Task]] = {}

    def tasks(self) -> list[Task]:
        """Return the tasks of the run's latest try that began, in order of their start."""
        return _latest([task for task in self.all_tasks() if task.state != SUBMITTED])

    def news(self) -> list[Task]:
        """Return the same, or the plan of a try that was asked for where nothing has been heard of any since.

        Another try that is at work is heard of within WRITE_EVERY_S: this one waits, or is refused.
        """
        found = self.all_tasks()
        told = _latest([task for task in found if task.state != SUBMITTED])
        asked = [task for task in found if task.state == SUBMITTED]
        return asked if asked and all(task.updated < asked[0].started for task in told) else told

    def all_tasks(self) -> list[Task]:
        """Return the tasks of all tries of the run, begun or asked for."""
        entries = [entry for entry in storage.entries(self.folder) if entry.uri.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            found = dict(zip((entry.uri for entry in entries), pool.map(self._read, entries), strict=True))
        self._known = {uri: known for uri, known in found.items() if known}
        return [task for _, task in self._known.values()]

    def _read(self, entry: storage.Entry) -> tuple[str, Task] | None:
        known = self._known.get(entry.uri)
        if known and known[0] == entry.version:
            return known
        data = storage.read_if_there(entry.uri)
        try:
            return (entry.version, Task.model_validate_json(data)) if data else None
        except ValueError:  # another version's: its run is over or will overwrite it
            return None

    def uri(self, task: str) -> str:
        """Return where a task's object lies."""
        return storage.join(self.folder, f"{task}.json")


def _latest(tasks: list[Task]) -> list[Task]:
    begun = max((task.started for task in tasks if task.task == FIRST), default=0.0)
    return sorted((task for task in tasks if task.updated >= begun), key=lambda task: (task.started, task.task))


def announce(workdir: str, run: str) -> None:
    """Say that a run was asked for, so that `watch` does not take an earlier try's end for this one's.

    It stands beside the tasks: of a run of that name that is at work, nothing is forgotten.
    """
    now = time.time()
    first = Task(task=FIRST, stage=FIRST, pod="", state=SUBMITTED, started=now, updated=now)
    storage.write(Board(workdir, run).uri(SUBMITTED), first.model_dump_json().encode())


def refuse_again(board: Board, task: str) -> None:
    """Raise Refused with the line of the try before this one, where that refused the task.

    Kubeflow starts a pod again whatever its exit code is: bad input would be read as often as a node may be lost.
    """
    if os.environ.get(RETRY, "0") == "0":
        return
    before = None
    with suppress(OSError, SemiscaleError, ValueError):  # the stage itself says what is wrong with the store
        before = Task.model_validate_json(storage.read(board.uri(task)))
    if before and before.exit_code == Refused.exit_code:
        raise Refused(before.reason)


def devices() -> int:
    """Count this task's devices, under torchrun those of all ranks. Without a GPU the pod is what is paid for."""
    return max(1, int(os.environ.get("WORLD_SIZE", gpus())))


def gpus() -> int:
    """Count the GPUs of this machine or container by their device files; torch takes seconds to import."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def reported(board: Board, task: str, stage: str, on_device: bool = False, budget_hours: float = 0.0) -> Iterator[None]:
    """Keep a task's object up to date while its work runs, and end it with how that went.

    Turns SIGTERM into Stopped. Raises BudgetSpent where the run's tasks have used up its device-hours, after stopping
    the work as SIGTERM would.
    """
    reporter = _Reporter(board, task, stage, devices() if on_device else 0, budget_hours)
    with stopping_on_sigterm():
        try:
            reporter.start()
            yield
        except BaseException as error:
            reporter.end(error)
            if reporter.over_budget:
                raise BudgetSpent(reporter.over_budget) from None
            raise
        reporter.end(None)


class _Reporter:
    """Writes one task's object from a thread of its own, and watches the budget where there is one."""

    def __init__(self, board: Board, task: str, stage: str, devices: int, budget_hours: float) -> None:
        now = time.time()
        self._board, self._budget_s = board, budget_hours * 3600
        self._task = Task(
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
        self._spending = Spending()
        self._over = threading.Event()
        self._silent = False
        self.over_budget = ""
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="progress")

    def start(self) -> None:
        """Begin. With a budget the first look comes before the work: a run that spent it begins nothing more."""
        if self._budget_s and self._task.devices:
            self._quietly(self._look)
            if self.over_budget:
                raise Stopped(self.over_budget)
        self._thread.start()

    def end(self, error: BaseException | None) -> None:
        """Write how it ended."""
        self._over.set()
        if self._thread.ident:
            self._thread.join(WRITE_EVERY_S)
        self._quietly(lambda: self._write(_ending(error, self.over_budget)))

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
        left_s = self._spending.left_s(self._budget_s) if self._budget_s and self._task.devices else WRITE_EVERY_S
        return min(WRITE_EVERY_S, max(left_s, LOOK_AGAIN_S))

    def _carry_over(self, tasks: list[Task] | None = None) -> None:
        found = self._board.tasks() if tasks is None else tasks
        self._before_s = next((task.device_s for task in found if task.task == self._task.task), 0.0)

    def _look(self) -> None:
        tasks = self._board.tasks()
        if not self._thread.ident:
            self._carry_over(tasks)
        self._spending = Spending(tasks, self._task)
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
            if not ending and now - other.updated < FRESH_S:
                return  # a rank that this process started, on this machine or another, speaks for both
            fields |= other.model_dump(include={"done", "total", "unit", "detail", "per_s"})
            fields["device_s"] = max(round(spent, 1), other.device_s)
        task = self._task.model_copy(update=fields)
        storage.write(self._board.uri(task.task), task.model_dump_json().encode())

    def _of_another_process(self) -> Task | None:
        data = storage.read_if_there(self._board.uri(self._task.task))
        found = Task.model_validate_json(data) if data else None
        mine = (self._task.pod, self._task.process)
        return found if found and (found.pod, found.process) != mine and found.started >= self._task.started else None

    def _quietly(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever the store does, the work goes on
            if not self._silent:
                say(self._task.stage, f"progress cannot be stored, the work goes on: {error}")
            self._silent = True


class Spending:
    """Device-seconds that a run's tasks had used at one look, and how fast they go on: no pod has to look often.

    The task that looks is at work, also where its object does not say so yet.
    """

    def __init__(self, tasks: list[Task] | None = None, own: Task | None = None) -> None:
        self._looked = time.monotonic()
        self._known = tasks is not None
        self.device_s = sum(task.device_s for task in tasks or [])
        running = {task.task: task.devices for task in tasks or [] if task.state == "running"}
        self._per_s = sum((running | ({own.task: own.devices} if own else {})).values())
        self._every_s = READ_EVERY_S * (1 + len(tasks or []) // 20)

    def may_exceed(self, budget_s: float) -> bool:
        """Say whether it is time to look again: the budget may be used up by now, or the look is old."""
        return not self._known or self.left_s(budget_s) <= 0 or time.monotonic() - self._looked >= self._every_s

    def left_s(self, budget_s: float) -> float:
        """Return the seconds in which those that were at work use up the budget."""
        left = budget_s - self.device_s
        return left / max(self._per_s, 1e-9) - (time.monotonic() - self._looked)


def _ending(error: BaseException | None, over_budget: str) -> dict[str, object]:
    if error is None:
        return {"state": "finished"}
    if over_budget:
        return {"state": "stopped", "reason": over_budget, "exit_code": BudgetSpent.exit_code}
    reason = one_line(str(error)) or type(error).__name__
    code = error.exit_code if isinstance(error, SemiscaleError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    return {"state": "stopped" if code > 128 else "failed", "reason": reason, "exit_code": code}
