"""The verb `watch`: show the live progress of a run, read from its workdir alone."""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from semiscale import storage
from semiscale.cli.command import Command, Options, non_negative_float
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.observability import status_reporter
from semiscale.observability.progress import format_duration, format_progress
from semiscale.observability.task_status import RunStatusStore, TaskStatus

# The stage whose task ends a run.
FINAL_STAGE = "report"
# A running task writes its status every ten seconds.
SILENT_AFTER_S = status_reporter.HEARTBEAT_TIMEOUT_S
# The pod of a failed task is not started again if no task has written its status for so long.
ABANDONED_AFTER_S = 180.0
CLEAR_SCREEN = "\x1b[H\x1b[J"
# The reason of a failed task ends with the id of its error.
ERROR_ID = re.compile(r" \[(SEMI-E\d{3})\]$")


def watch(path: Path, once: bool, every_s: float) -> None:
    """Show the progress of every task of a run until the run ends.

    Args:
        path: The run file.
        once: Print the progress once and return.
        every_s: Seconds between two reads of the workdir.

    Raises:
        InvalidInputError: `once` is set and the run was never started.
        SemiscaleError: The run failed. The error has the exit code of the run.
    """
    settings = run_config.load_run_config(path)
    status_store = RunStatusStore(storage.absolute_uri(settings.workdir), settings.name)
    live = sys.stdout.isatty() and not once
    while True:
        tasks = status_store.latest()
        if once and not tasks:
            raise InvalidInputError(
                "SEMI-E410", f"{status_store.folder}: Run {settings.name!r} has no task here. Start the run first."
            )
        now = time.time()
        print(
            (CLEAR_SCREEN if live else "") + render(settings.name, tasks, now, terminal_width()),
            end="" if live else "\n",
            flush=True,
        )
        if terminal_task(tasks, now) or once:
            break
        time.sleep(every_s)
    if last_task := terminal_task(tasks, time.time()):
        raise_failure(last_task)


def terminal_task(tasks: Sequence[TaskStatus], now: float) -> TaskStatus | None:
    """Return the task that ended a run, or None while the run is active.

    A task that refused its input ends the run at once, because it is not retried. Another failed task ends the run
    when no task has written its status for ABANDONED_AFTER_S. Until then its pod may be started again.

    Args:
        tasks: The latest status of every task.
        now: Seconds since the epoch.
    """
    finished = [task for task in tasks if task.stage == FINAL_STAGE and task.state == "finished"]
    failed = [task for task in tasks if task.state in ("failed", "stopped")]
    refused = [task for task in failed if task.exit_code == InvalidInputError.exit_code]
    if finished or refused:
        return (finished or refused)[0]
    is_abandoned = all(now - task.updated > ABANDONED_AFTER_S for task in tasks)
    return failed[0] if failed and is_abandoned else None


def raise_failure(task: TaskStatus) -> None:
    """Raise the error of the task that ended a run, if it did not finish.

    Raises:
        SemiscaleError: The task failed or was stopped. The error has its id and its exit code.
    """
    if task.state == "finished":
        return
    # A status that an older version wrote has no id.
    error_id = ERROR_ID.search(task.reason)
    reason = ERROR_ID.sub("", task.reason) or "The task left no reason. See its log."
    failure = SemiscaleError(error_id[1] if error_id else "SEMI-E411", f"{task.task}: {reason}")
    failure.exit_code = task.exit_code or SemiscaleError.exit_code
    raise failure


def render(run: str, tasks: Sequence[TaskStatus], now: float, columns: int) -> str:
    """Return the progress of a run: one line for the run and one for each task.

    Args:
        run: Name of the run.
        tasks: The latest status of every task.
        now: Seconds since the epoch.
        columns: Width to which lines are cut.
    """
    if not tasks:
        return f"{run}: no task has started yet\n"
    counts = {
        state: sum(task.state == state for task in tasks) for state in ("finished", "running", "failed", "stopped")
    }
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    elapsed = format_duration(max(task.updated for task in tasks) - min(task.started for task in tasks))
    hours = sum(task.device_s for task in tasks) / 3600
    head = f"{run}: {summary or 'submitted'} · {elapsed}" + (f" · {hours:,.2f} device-hours" if hours else "")
    width = max(len(task.task) for task in tasks)
    lines = [f"{task.task:{width}}  {task_line(task, now)}" for task in tasks]
    return "".join(f"{to_single_line(line)[:columns]}\n" for line in [head, *lines])


def task_line(task: TaskStatus, now: float) -> str:
    """Return the progress of one task."""
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
    """Draw the finished share as a bar, if the total is known."""
    if not task.total:
        return ""
    full = min(20 * task.done // task.total, 20)
    return "█" * full + "░" * (20 - full) + " "


def terminal_width() -> int:
    """Return the columns of the terminal; output to a file is not cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `watch`."""
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--once", action="store_true", help="print once, and exit with the run's code if it has ended")
    parser.add_argument(
        "--every", type=non_negative_float, default=5.0, metavar="SECONDS", help="between two reads (5)"
    )


def execute(options: Options) -> None:
    """Run the verb."""
    watch(options.run_file, options.once, options.every)


COMMAND = Command(
    help="live progress of a run, here or on a cluster",
    description="Show the progress of every task of a run until the run ends, and exit with the run's exit code.\n\n"
    "Reads the workdir alone. A task whose pod died is silent until another pod resumes it.",
    examples=("my-run.yaml", "my-run.yaml --once"),
    add_arguments=add_arguments,
    execute=execute,
)
