"""Tasks of a run, as the pods that do them tell of them in the workdir."""

from typing import Any

from components.shared import storage
from components.shared.tasks import Board, Task


def task(name: str, **fields: Any) -> Task:
    """Return a task that runs."""
    given = {"state": "running", "started": 1000.0, "updated": 1100.0, **fields}
    return Task(task=name, stage=name.partition("-")[0], pod="a", **given)


def put(board: Board, task: str, **fields: Any) -> None:
    """Write a task's object, as its pod would have."""
    content = Task(task=task, stage=task.partition("-")[0], pod="a", **{"state": "finished", **fields})
    storage.write(board.uri(task), content.model_dump_json().encode())
