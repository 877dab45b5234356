"""Define the status objects of tasks, `<workdir>/progress/<run>/<task>.json`, and read them.

`watch` reads these objects, and so does every task of a run that has a budget. Each object is small and overwritten.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal

from semiscale import storage
from semiscale.storage.documents import StrictDocument

READERS = 32


FIRST_TASK = "plan"  # the task that every run begins with: what is older than its start is of an earlier try


SUBMITTED: Final = "submitted"  # the object that says that a try was asked for; whether it begins, its plan decides


class TaskStatus(StrictDocument):
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


class RunStatusStore:
    """All tasks of one run. What has not changed since the last look is not read again.

    A look costs one listing and a read of every object that changed: at most all tasks, a few hundred.
    """

    def __init__(self, workdir: str, run: str) -> None:
        self.folder = storage.join(workdir, "progress", run)
        self._known: dict[str, tuple[str, TaskStatus]] = {}

    def current_tasks(self) -> list[TaskStatus]:
        """Return the tasks of the run's latest try that began, in order of their start."""
        return _latest([task for task in self.all_attempts() if task.state != SUBMITTED])

    def latest(self) -> list[TaskStatus]:
        """Return the same, or the plan of a try that was asked for where nothing has been heard of any since.

        Another try that is at work is heard of within WRITE_EVERY_S: this one waits, or is refused.
        """
        found = self.all_attempts()
        begun = _latest([task for task in found if task.state != SUBMITTED])
        asked = [task for task in found if task.state == SUBMITTED]
        return asked if asked and all(task.updated < asked[0].started for task in begun) else begun

    def all_attempts(self) -> list[TaskStatus]:
        """Return the tasks of all tries of the run, begun or asked for."""
        entries = [entry for entry in storage.list_objects(self.folder) if entry.uri.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            found = dict(zip((entry.uri for entry in entries), pool.map(self._read, entries), strict=True))
        self._known = {uri: known for uri, known in found.items() if known}
        return [task for _, task in self._known.values()]

    def _read(self, entry: storage.ObjectInfo) -> tuple[str, TaskStatus] | None:
        known = self._known.get(entry.uri)
        if known and known[0] == entry.version:
            return known
        data = storage.read_or_none(entry.uri)
        try:
            return (entry.version, TaskStatus.model_validate_json(data)) if data else None
        except ValueError:  # another version's: its run is over or will overwrite it
            return None

    def uri(self, task: str) -> str:
        """Return where a task's object lies."""
        return storage.join(self.folder, f"{task}.json")


def _latest(tasks: list[TaskStatus]) -> list[TaskStatus]:
    begun = max((task.started for task in tasks if task.task == FIRST_TASK), default=0.0)
    return sorted((task for task in tasks if task.updated >= begun), key=lambda task: (task.started, task.task))


def announce_submission(workdir: str, run: str) -> None:
    """Say that a run was asked for, so that `watch` does not take an earlier try's end for this one's.

    It stands beside the tasks: of a run of that name that is at work, nothing is forgotten.
    """
    now = time.time()
    first = TaskStatus(task=FIRST_TASK, stage=FIRST_TASK, pod="", state=SUBMITTED, started=now, updated=now)
    storage.write_bytes(RunStatusStore(workdir, run).uri(SUBMITTED), first.model_dump_json().encode())
