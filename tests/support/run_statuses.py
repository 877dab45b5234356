"""Tasks of a run, as the pods that do them tell of them in the workdir."""

from typing import Any

from semiscale import storage
from semiscale.observability.task_status import RunStatusStore, TaskStatus


def running_task(name: str, **fields: Any) -> TaskStatus:
    """Return a task that runs."""
    given = {"state": "running", "started": 1000.0, "updated": 1100.0, **fields}
    return TaskStatus(task=name, stage=name.partition("-")[0], pod="a", **given)


def write_status(board: RunStatusStore, task: str, **fields: Any) -> None:
    """Write a task's object, as its pod would have."""
    content = TaskStatus(task=task, stage=task.partition("-")[0], pod="a", **{"state": "finished", **fields})
    storage.write_bytes(board.uri(task), content.model_dump_json().encode())
