"""Refuse a run while another run of the same name is active.

Two such runs would train the same models twice. The plan of the second run is refused before it writes its status
object, so the status of the first run stays the latest attempt. Kubeflow keeps the runs of one schedule apart. It does
not do so for the runs of a replaced schedule, or for a run that is submitted by hand.
"""

import os
import socket
import time

from semiscale.common.errors import InvalidInputError
from semiscale.observability.progress import log_info
from semiscale.observability.status_reporter import HEARTBEAT_TIMEOUT_S
from semiscale.observability.task_status import RunStatusStore, TaskStatus

POLL_INTERVAL_S = 1.0
MAX_TASKS_IN_LOG = 5


def check_no_concurrent_run(workdir: str, run: str) -> None:
    """Check that no task of a run of this name is active.

    An active task rewrites its status object every few seconds. The task is dead if its object stays the same for
    HEARTBEAT_TIMEOUT_S. No clocks of two machines are compared. The check does not wait if no task is left running.

    Args:
        workdir: URI of the workdir.
        run: Name of the run.

    Raises:
        InvalidInputError: If a task of the run is active, a plan included.
    """
    status_store = RunStatusStore(workdir, run)
    unchanged = _running_tasks(status_store)
    if unchanged:
        log_info(
            "plan",
            f"an earlier attempt left {', '.join(sorted(unchanged)[:MAX_TASKS_IN_LOG])}: "
            f"waiting {HEARTBEAT_TIMEOUT_S:.0f} s for a heartbeat",
        )
    deadline = time.monotonic() + HEARTBEAT_TIMEOUT_S
    while unchanged and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
        running = _running_tasks(status_store)
        active = sorted(task for task, updated in running.items() if unchanged.get(task) != updated)
        if active:
            raise InvalidInputError(
                "SEMI-E202",
                f"name: a run {run!r} is active, for {active[0]} sends heartbeats. Wait for its end, cancel it, or "
                "give this run another name.",
            )
        unchanged = running


def _running_tasks(status_store: RunStatusStore) -> dict[str, float]:
    """Return the time of the last update by task, for running tasks that may be alive."""
    return {
        task.task: task.updated
        for task in status_store.all_attempts()
        if task.state == "running" and not _is_dead_local_process(task)
    }


def _is_dead_local_process(task: TaskStatus) -> bool:
    if task.pod != socket.gethostname():
        return False
    try:
        os.kill(task.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # The process exists and belongs to another user.
        return False
    return False
