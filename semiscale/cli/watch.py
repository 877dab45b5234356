"""Watch: live progress of every task of a run, from the object store alone: a run on this machine or on any cluster."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.observability import status_reporter
from semiscale.observability.progress import format_duration, format_progress
from semiscale.observability.task_status import RunStatusStore, TaskStatus

FINAL_STAGE = "report"  # the task that ends a run
SILENT_AFTER_S = status_reporter.HEARTBEAT_TIMEOUT_S  # a task that runs writes every ten seconds
ABANDONED_AFTER_S = 180.0  # a failed task that nothing follows: its pod is not started again
CLEAR = "\x1b[H\x1b[J"


def watch(path: Path, once: bool, every_s: float) -> None:
    """Show how far every task of a run is, until the run ends; the exit code is the run's.

    Reads nothing but the workdir. A task whose pod died is silent until another pod goes on with it.
    """
    settings = run_config.load_run_config(path)
    board = RunStatusStore(storage.absolute_uri(settings.workdir), settings.name)
    live = sys.stdout.isatty() and not once
    while True:
        found = board.latest()
        if once and not found:
            raise InvalidInputError(f"{board.folder}: nothing here; was the run {settings.name!r} started?")
        now = time.time()
        print(
            (CLEAR if live else "") + render(settings.name, found, now, terminal_width()),
            end="" if live else "\n",
            flush=True,
        )
        if terminal_task(found, now) or once:
            break
        time.sleep(every_s)
    if ended := terminal_task(found, time.time()):
        raise_failure(ended)


def terminal_task(found: Sequence[TaskStatus], now: float) -> TaskStatus | None:
    """Return the task that a run ended with, or None while it is under way.

    A failed or stopped task ends a run when nothing has been heard of any for some minutes: until then its pod may be
    started again. Bad input is not tried again.
    """
    ends = [task for task in found if task.stage == FINAL_STAGE and task.state == "finished"]
    bad = [task for task in found if task.state in ("failed", "stopped")]
    refused = [task for task in bad if task.exit_code == InvalidInputError.exit_code]
    if ends or refused:
        return (ends or refused)[0]
    quiet = all(now - task.updated > ABANDONED_AFTER_S for task in found)
    return bad[0] if bad and quiet else None


def raise_failure(ended: TaskStatus) -> None:
    """Raise what a run ended with, with its exit code. Nothing where it finished."""
    if ended.state == "finished":
        return
    failure = SemiscaleError(f"{ended.task}: {ended.reason}")
    failure.exit_code = ended.exit_code or SemiscaleError.exit_code
    raise failure


def render(run: str, found: Sequence[TaskStatus], now: float, columns: int) -> str:
    """Return one look at a run: a line for the whole, and one for each task, cut to the terminal's width."""
    if not found:
        return f"{run}: nothing has begun yet\n"
    counts = {
        state: sum(task.state == state for task in found) for state in ("finished", "running", "failed", "stopped")
    }
    numbers = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    since = format_duration(max(task.updated for task in found) - min(task.started for task in found))
    hours = sum(task.device_s for task in found) / 3600
    head = f"{run}: {numbers or 'submitted'} · {since}" + (f" · {hours:,.2f} device-hours" if hours else "")
    wide = max(len(task.task) for task in found)
    lines = [f"{task.task:{wide}}  {task_line(task, now)}" for task in found]
    return "".join(f"{to_single_line(line)[:columns]}\n" for line in [head, *lines])


def task_line(task: TaskStatus, now: float) -> str:
    """Return how far one task is."""
    if task.state == "submitted":
        return f"submitted {format_duration(now - task.started)} ago, waiting for a pod"
    if task.state == "finished":
        done = f"{task.done:,} {task.unit} · " if task.done else ""
        return f"finished · {done}{format_duration(task.updated - task.started)}"
    if task.state in ("failed", "stopped"):
        return f"{task.state}: {task.reason}"
    silent_s = now - task.updated
    silence = f" · silent for {format_duration(silent_s)}" if silent_s > SILENT_AFTER_S else ""
    progress = format_progress(task.done, task.total, task.unit, task.per_s, task.detail) if task.done else "running"
    return f"{progress_bar(task)}{progress}{silence}"


def progress_bar(task: TaskStatus) -> str:
    """Draw the share that is done, where the total is known."""
    if not task.total:
        return ""
    full = min(20 * task.done // task.total, 20)
    return "█" * full + "░" * (20 - full) + " "


def terminal_width() -> int:
    """Return the terminal's columns; what goes elsewhere is not cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
