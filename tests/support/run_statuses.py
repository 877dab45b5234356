"""Build the status of tasks, and write it as a pod does."""

from typing import Any

from semiscale import storage
from semiscale.observability.task_status import RunStatusStore, TaskStatus


def running_task(name: str, **fields: Any) -> TaskStatus:
    """Return the status of a running task."""
    values = {"state": "running", "started": 1000.0, "updated": 1100.0, **fields}
    return TaskStatus(task=name, stage=name.partition("-")[0], pod="a", **values)


def write_status(store: RunStatusStore, task: str, **fields: Any) -> None:
    """Write the status object of a task."""
    status = TaskStatus(task=task, stage=task.partition("-")[0], pod="a", **{"state": "finished", **fields})
    storage.write_bytes(store.uri(task), status.model_dump_json().encode())
