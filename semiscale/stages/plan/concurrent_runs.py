"""Overlap: two runs of one name at a time would train the same models twice; the second is refused by its plan, before
it says that it began: what the first has told stays the latest try's.

Kubeflow keeps the runs of one schedule apart, not those of a schedule that was replaced, nor one that is submitted by
hand meanwhile.
"""

import os
import socket
import time

from semiscale.common.errors import InvalidInputError
from semiscale.observability.progress import log_info
from semiscale.observability.status_reporter import HEARTBEAT_TIMEOUT_S
from semiscale.observability.task_status import RunStatusStore, TaskStatus

POLL_INTERVAL_S = 1.0


def check_no_concurrent_run(workdir: str, run: str) -> None:
    """Raise InvalidInputError where tasks of this run are at work, a plan among them; none of its own is yet.

    What works writes its object anew every few seconds: one that stays as it is for FRESH_S is a dead pod's. No clocks
    are compared, and where nothing was left unfinished, nothing is waited for.
    """
    board = RunStatusStore(workdir, run)
    left = _running(board)
    if left:
        log_info(
            "plan",
            f"an earlier try left {', '.join(sorted(left)[:5])}: "
            f"watching for {HEARTBEAT_TIMEOUT_S:.0f} s whether it goes on",
        )
    until = time.monotonic() + HEARTBEAT_TIMEOUT_S
    while left and time.monotonic() < until:
        time.sleep(POLL_INTERVAL_S)
        now = _running(board)
        if working := sorted(task for task, updated in now.items() if left.get(task) != updated):
            raise InvalidInputError(
                f"name: a run {run!r} is under way ({working[0]} is at work); wait for its end, or cancel it, or give "
                "this run another name"
            )
        left = now


def _running(board: RunStatusStore) -> dict[str, float]:
    """Return when the tasks that say they run last said so, but for what died on this machine."""
    return {
        task.task: task.updated
        for task in board.all_attempts()
        if task.state == "running" and not _is_dead_local_process(task)
    }


def _is_dead_local_process(task: TaskStatus) -> bool:
    if task.pod != socket.gethostname():
        return False
    try:
        os.kill(task.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which is there
        return False
    return False
