"""Define, read and announce the status objects of tasks.

A status object is `<workdir>/progress/<run>/<task>.json`. `watch` reads these objects, and so does every task of a run
that has a budget. Each object is small and is overwritten.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal

from semiscale import storage
from semiscale.storage.documents import StrictDocument

MAX_CONCURRENT_READS = 32
# Every run begins with this task. Objects that were last written before its start belong to an earlier attempt.
FIRST_TASK = "plan"
# The name and the state of the object of an attempt that was submitted. The attempt begins with its plan.
SUBMITTED: Final = "submitted"


class TaskStatus(StrictDocument):
    """One task of a run.

    Times are seconds since 1970. `device_s` includes the device-seconds that dead pods spent on the task.
    """

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
    """Reads the status objects of one run.

    An object that has not changed since the last call is not read again.

    Args:
        workdir: URI of the workdir.
        run: Name of the run.

    Cost:
        Each call lists the objects and reads every object that has changed. A run has at most a few hundred.
    """

    def __init__(self, workdir: str, run: str) -> None:
        self.folder = storage.join(workdir, "progress", run)
        self._known: dict[str, tuple[str, TaskStatus]] = {}

    def current_tasks(self) -> list[TaskStatus]:
        """Return the tasks of the latest attempt that has begun, in order of their start."""
        return _latest([task for task in self.all_attempts() if task.state != SUBMITTED])

    def latest(self) -> list[TaskStatus]:
        """Return the tasks of the latest attempt, whether it has begun or not.

        A submitted attempt is the latest if no task has reported since its submission. It consists of its plan. If
        another attempt is running, one of its tasks reports within `status_reporter.HEARTBEAT_INTERVAL_S`. The
        submitted attempt then waits or is refused.
        """
        tasks = self.all_attempts()
        begun = _latest([task for task in tasks if task.state != SUBMITTED])
        submitted = [task for task in tasks if task.state == SUBMITTED]
        return submitted if submitted and all(task.updated < submitted[0].started for task in begun) else begun

    def all_attempts(self) -> list[TaskStatus]:
        """Return the tasks of all attempts of the run, whether they have begun or not."""
        entries = [entry for entry in storage.list_objects(self.folder) if entry.uri.endswith(".json")]
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            read = dict(zip((entry.uri for entry in entries), pool.map(self._read, entries), strict=True))
        self._known = {uri: known for uri, known in read.items() if known}
        return [task for _, task in self._known.values()]

    def _read(self, entry: storage.ObjectInfo) -> tuple[str, TaskStatus] | None:
        known = self._known.get(entry.uri)
        if known and known[0] == entry.version:
            return known
        data = storage.read_or_none(entry.uri)
        try:
            return (entry.version, TaskStatus.model_validate_json(data)) if data else None
        # Another version of the program wrote the object. Its run has ended or will overwrite the object.
        except ValueError:
            return None

    def uri(self, task: str) -> str:
        """Return the URI of a task's object."""
        return storage.join(self.folder, f"{task}.json")


def _latest(tasks: list[TaskStatus]) -> list[TaskStatus]:
    """Return the tasks of the latest plan's attempt, in order of their start."""
    plan_started = max((task.started for task in tasks if task.task == FIRST_TASK), default=0.0)
    return sorted((task for task in tasks if task.updated >= plan_started), key=lambda task: (task.started, task.task))


def announce_submission(workdir: str, run: str) -> None:
    """Record that a run was submitted.

    Without the record, `watch` would report the end of an earlier attempt. The record is an object of its own. It does
    not overwrite the tasks of a running run of the same name.

    Args:
        workdir: URI of the workdir.
        run: Name of the run.
    """
    now = time.time()
    first = TaskStatus(task=FIRST_TASK, stage=FIRST_TASK, pod="", state=SUBMITTED, started=now, updated=now)
    storage.write_bytes(RunStatusStore(workdir, run).uri(SUBMITTED), first.model_dump_json().encode())


def cancellation_uri(workdir: str, run: str) -> str:
    """Return the URI of the object that says that a run was cancelled."""
    return storage.join(workdir, run, "cancelled.json")


def announce_cancellation(workdir: str, run: str) -> None:
    """Record that a run was cancelled, for pods that Kubeflow does not end with it.

    A pod that starts later ignores the record of an earlier cancellation. It stops when the record changes.

    Args:
        workdir: URI of the workdir.
        run: Name of the run.
    """
    storage.write_bytes(cancellation_uri(workdir, run), json.dumps({"at": time.time()}).encode())
