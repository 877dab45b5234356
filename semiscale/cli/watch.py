"""The verb `watch`: show the live progress of a run, read from its workdir alone."""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kfp import Client

from semiscale import storage
from semiscale.cli.command import Command, Options, non_negative_float
from semiscale.cli.kfp_client import (
    ACTIVE_STATES,
    HOST_ENV,
    Server,
    add_connection_arguments,
    connect,
    find_runs,
    server_from_options,
)
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
# Leases of a dead pod expire within this time, and Kubeflow starts a pod again after 30 s. A run whose tasks are all
# silent for longer has ended.
ABANDONED_AFTER_S = 180.0
CLEAR_SCREEN = "\x1b[H\x1b[J"
# The reason of a failed task ends with the id of its error.
ERROR_ID = re.compile(r" \[(SEMI-E\d{3})\]$")


def watch(path: Path, once: bool, every_s: float, server: Server | None = None) -> None:
    """Show the progress of every task of a run until the run ends.

    Args:
        path: The run file.
        once: Print the progress once and return.
        every_s: Seconds between two reads of the workdir.
        server: Kubeflow Pipelines to ask about the run while its tasks are silent. None: silence alone decides.

    Raises:
        InvalidInputError: `once` is set and the run was never started.
        SemiscaleError: The run failed, or its pod was killed and none took over. The error has the exit code of the
            run.
    """
    settings = run_config.load_run_config(path)
    status_store = RunStatusStore(storage.absolute_uri(settings.workdir), settings.name)
    live = sys.stdout.isatty() and not once
    client: Client | None = None
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
        last_task = terminal_task(tasks, now)
        is_silent = bool(tasks) and all(now - task.updated > SILENT_AFTER_S for task in tasks)
        if server and is_silent and not (last_task and last_task.state == "finished"):
            # The server knows whether the run goes on. Its pod may wait for a node for hours.
            last_task = None
            client = client or connect(server)
            raise_if_ended_on_server(settings.name, client, server.namespace)
        if last_task or once:
            break
        time.sleep(every_s)
    if last_task:
        raise_failure(last_task)


def raise_if_ended_on_server(name: str, client: Client, namespace: str) -> None:
    """Raise an error if Kubeflow Pipelines has ended the newest run of a name.

    Args:
        name: Name of the run.
        client: Client of the server.
        namespace: Namespace of the user. Empty: the server has none.

    Raises:
        SemiscaleError: The run has ended.
        InvalidInputError: The server refuses the request.
    """
    newest = next(find_runs(client, name, namespace), None)
    if newest and newest.state not in (*ACTIVE_STATES, "CANCELING"):
        reason = getattr(newest.error, "message", "") or "it gives no reason"
        raise SemiscaleError(
            "SEMI-E442",
            f"run {newest.run_id}: Kubeflow has ended the run ({newest.state}): {reason}. Finished work is kept. "
            "Submit it again to continue.",
        )


def terminal_task(tasks: Sequence[TaskStatus], now: float) -> TaskStatus | None:
    """Return the task that ended a run, or None while the run is active.

    A task that refused its input ends the run at once, because it is not retried. Another failed task, or one whose
    pod was killed, ends the run when no task has written its status for ABANDONED_AFTER_S. Until then a pod may be
    started again. A task that waits for its first pod has no status and ends nothing.

    Args:
        tasks: The latest status of every task.
        now: Seconds since the epoch.
    """
    finished = [task for task in tasks if task.stage == FINAL_STAGE and task.state == "finished"]
    failed = [task for task in tasks if task.state in ("failed", "stopped")]
    running = [task for task in tasks if task.state == "running"]
    refused = [task for task in failed if task.exit_code == InvalidInputError.exit_code]
    if finished or refused:
        return (finished or refused)[0]
    is_abandoned = all(now - task.updated > ABANDONED_AFTER_S for task in tasks)
    return next(iter(failed + running), None) if is_abandoned else None


def raise_failure(task: TaskStatus) -> None:
    """Raise the error of the task that ended a run, if it did not finish.

    Raises:
        SemiscaleError: The task failed or was stopped. The error has its id and its exit code.
    """
    if task.state == "finished":
        return
    if task.state == "running":
        raise SemiscaleError(
            "SEMI-E443",
            f"{task.task}: Silent for {format_duration(time.time() - task.updated)}. Its process was killed, and no "
            "other one has taken over. Finished work is kept. Start the run again to continue.",
        )
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
    add_connection_arguments(parser)
    parser.add_argument(
        "--every", type=non_negative_float, default=5.0, metavar="SECONDS", help="between two reads (5)"
    )


def execute(options: Options) -> None:
    """Run the verb."""
    # A machine that reads only the workdir has no server, and kfp would wait for one.
    is_configured = options.host or os.environ.get(HOST_ENV)
    watch(options.run_file, options.once, options.every, server_from_options(options) if is_configured else None)


COMMAND = Command(
    help="live progress of a run, here or on a cluster",
    description="Show the progress of every task of a run until the run ends, and exit with the run's exit code.\n\n"
    "Reads the workdir. A task whose pod died is silent until another pod resumes it. If all tasks are silent for\n"
    "three minutes, the run has ended. With --host, Kubeflow is asked about a silent run instead.",
    examples=("my-run.yaml", "my-run.yaml --once", "my-run.yaml --host https://kubeflow.example/pipeline"),
    add_arguments=add_arguments,
    execute=execute,
)
