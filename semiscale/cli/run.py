"""The verb `run`: run the compiled pipeline on this machine with kfp.local, a task a process or a container."""

import argparse
import builtins
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kfp import components, local

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.compile import DEFAULT_PIPELINE_YAML
from semiscale.cli.docker_runner import docker_runner
from semiscale.common import parent_exit
from semiscale.common.cpu import available_cpus
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import TERMINATED_ID
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.observability import task_status
from semiscale.observability.progress import parse_failure, use_json_logs
from semiscale.receipts.evaluate import has_top5
from semiscale.stages.plan.run_name import check_workdir_writable

# The tasks that kfp.local runs at a time inside a loop.
CONCURRENT_TASKS = 2
# Retries and the environment of pods are for a cluster alone.
CLUSTER_ONLY_FIELDS = re.compile(r"^( +)(?:retryPolicy|env):\n(?:\1[ -] *.*\n)+", re.MULTILINE)
# A log line of a stage, as text or as JSON.
STAGE_LINE = re.compile(r'^\s*([a-z]+ · |\{"time": )')
# The last line of a traceback.
ERROR_LINE = re.compile(r"^\s*([A-Za-z_.]*(?:Error|Exception)\b.*)")
MODEL_TITLES = {
    "teacher": "teacher",
    "baseline": "baseline, same images processed",
    "pretrained": "student before fine-tuning",
    "student": "student after fine-tuning",
}


def run(path: Path, docker: bool = False) -> None:
    """Run the pipeline of a run file on this machine and print its results.

    Args:
        path: The run file.
        docker: Run each task in its container instead of a process.

    Raises:
        InvalidInputError: The run file or an input is invalid.
        SemiscaleError: A stage fails. The error has the exit code of the stage.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    # The first object of a run is written below. A bad workdir is refused before it, as by the plan.
    check_workdir_writable(settings.workdir)
    log = log_path(settings)
    task_status.announce_submission(settings.workdir, settings.name)
    run_compiled(settings, log, docker)
    print_results(settings)


def log_path(settings: RunConfig) -> Path:
    """Return the path of kfp's log: next to the report, or under runs/ for a bucket."""
    folder = Path("runs") if storage.is_object_store(settings.workdir) else storage.uri_to_path(settings.workdir)
    return folder / settings.name / "local.log"


def run_compiled(settings: RunConfig, log: Path, docker: bool = False) -> None:
    """Run the compiled pipeline.

    Args:
        settings: The run file.
        log: File for the whole output of the tasks.
        docker: Run each task in its container instead of a process.

    Raises:
        InvalidInputError: A stage refused its input. The message is the last line of that stage.
        SemiscaleError: A stage failed. The message is the last line of that stage.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cpus() // CONCURRENT_TASKS, 1)))
    # The artifacts are small receipts that are in the workdir as well, so that this folder can be deleted.
    with tempfile.TemporaryDirectory(prefix="semiscale-") as root, capture_stdout(log) as output:
        # kfp.local warns for every task that GPUs and display names have no effect.
        warnings.filterwarnings("ignore", message=".*have no effect in the current local runner")
        compiled = CLUSTER_ONLY_FIELDS.sub("", DEFAULT_PIPELINE_YAML.read_text())
        parent_lock = Path(root, "parent-lock")
        parent_lock.touch()
        runner = docker_runner(settings, compiled, parent_lock) if docker else local.SubprocessRunner(use_venv=False)
        # Each container mounts both folders: the workspace that tasks share, and the outputs of tasks.
        local.init(runner, pipeline_root=f"{root}/tasks", workspace_root=f"{root}/workspace")
        pipeline = components.load_component_from_text(compiled)
        try:
            with restore_kfp_globals(), parent_exit.hold_parent_lock(parent_lock):
                pipeline(**settings.pipeline_arguments())
        except RuntimeError as error:
            cause = output.error or strip_ansi(str(error))
            failure = output.failure or SemiscaleError("SEMI-E401", f"{cause} See {log}.")
            failure.exit_code = failed_task_exit_code(settings, failure)
            raise failure from None


def failed_task_exit_code(settings: RunConfig, failure: SemiscaleError) -> int:
    """Return the exit code of the task that failed with this error.

    The status of the task in the workdir has the exit code. A line of text only tells refused from failed.

    Args:
        settings: The run file.
        failure: Error that the last line of the task gave.
    """
    with contextlib.suppress(OSError, SemiscaleError):
        for task in task_status.RunStatusStore(settings.workdir, settings.name).current_tasks():
            if task.exit_code and task.reason == str(failure):
                return task.exit_code
    return failure.exit_code


@contextlib.contextmanager
def restore_kfp_globals() -> Iterator[None]:
    """Restore the global state that the threads of kfp.local change.

    kfp.local replaces `print` by an indenting one, and leaves log handlers of a finished run.
    """
    original_print, logger = builtins.print, logging.getLogger()
    handlers = list(logger.handlers)
    # Two threads of kfp.local can remove every handler. Later messages would then go to standard error.
    logger.addHandler(logging.NullHandler())
    try:
        yield
    finally:
        builtins.print = original_print
        logger.handlers[:] = handlers


class StageOutputFilter(io.TextIOBase):
    """Standard output during a local run: shows the lines of stages and logs everything.

    The line of a stage that fails is shown at once. The command ends with the first such line on standard error.

    Args:
        screen: Stream for the lines of stages.
        log: Stream for all lines.

    Attributes:
        failure: Error in the first line by which a stage refused its input or failed. None: no such line yet.
        error: Last line of the first traceback. Empty: no traceback yet.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log, self._line = screen, log, ""
        # kfp.local prints from one thread for each task.
        self._lock = threading.Lock()
        self.failure: SemiscaleError | None = None
        self.error = ""

    def write(self, text: str) -> int:
        """Log a text and show the lines of stages in it."""
        with self._lock:
            self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if failure := parse_failure(line.strip()):
                self.failure = self.failure or failure
                # A stage that was stopped has not failed. The command itself says that it was stopped.
                if failure.code != TERMINATED_ID:
                    self._show_failure(line.strip())
            elif STAGE_LINE.match(line):
                self._screen.write(line.strip() + "\n")
            elif (error := ERROR_LINE.match(line)) and not self.error:
                self.error = error[1]
        self._screen.flush()

    def _show_failure(self, line: str) -> None:
        """Show at once why a task stopped, because tasks that do not need it go on, possibly for hours."""
        self._screen.write(line + "\n")
        if not use_json_logs(self._screen):
            self._screen.write("run · The run ends after the tasks that do not need this one.\n")


@contextlib.contextmanager
def capture_stdout(log: Path) -> Iterator[StageOutputFilter]:
    """Send standard output through a StageOutputFilter.

    Args:
        log: File for the whole output.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        # A person who follows the log sees each line at once.
        file = log.open("w", buffering=1)
    except OSError as error:
        raise InvalidInputError(
            "SEMI-E402", f"workdir: {log} cannot be written: {error.strerror}. Choose a workdir that you can write to."
        ) from None
    with file:
        output = StageOutputFilter(sys.stdout, file)
        with contextlib.redirect_stdout(output):
            yield output


def strip_ansi(text: str) -> str:
    """Remove the colour codes that kfp writes for terminals."""
    return re.sub(r"\x1b\[\d+m", "", text)


def results(settings: RunConfig) -> dict[str, Any]:
    """Load the results of a finished run."""
    content: dict[str, Any] = json.loads(
        storage.read_bytes(storage.join(settings.workdir, settings.name, "results.json"))
    )
    return content


def print_results(settings: RunConfig) -> None:
    """Print the table of results and the path of the report."""
    numbers = results(settings)
    shown = ["top1", "top5"] if has_top5(numbers["selection"]["classes"]) else ["top1"]
    print(f"\n{'on the test set':36}" + "".join(f"{name.replace('top', 'top-'):>8}" for name in shown))
    for model, title in MODEL_TITLES.items():
        print(f"{title:36}" + "".join(f"{numbers[model][name]:8.2%}" for name in shown))
    selection = numbers["selection"]
    print(
        f"\n{selection['images']:,} images selected ({selection['unique_images']:,} different) for "
        f"{selection['classes']} classes, {selection['short_classes']} of them short; "
        f"K = {selection['images_per_class']:,}, P = {selection['classes_per_image']}"
    )
    print(", ".join(f"{count:,} {outcome}" for outcome, count in numbers["ledger"].items()))
    print(f"{'promoted' if numbers['promotion']['promoted'] else 'not promoted'}: {numbers['promotion']['why']}")
    print(f"report: {display_path(storage.join(settings.workdir, settings.name, 'report.html'))}")


def display_path(uri: str) -> str:
    """Return a path relative to the current directory, if it is inside it."""
    path = Path(uri)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("run_file", type=Path, help="for example manifests/runs/demo.yaml")
    parser.add_argument("--docker", action="store_true", help="each task in its container, as on a cluster")


def execute(options: Options) -> None:
    """Run the verb."""
    run(options.run_file, options.docker)


COMMAND = Command(
    help="run the whole pipeline on this machine",
    description="Run a run file's pipeline on this machine and print its results. Finished work is reused.",
    examples=("my-run.yaml", "my-run.yaml --docker"),
    add_arguments=add_arguments,
    execute=execute,
)
