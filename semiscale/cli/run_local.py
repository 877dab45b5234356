"""Run the compiled pipeline on this machine with stock kfp.local: each task a process, or a container with --docker."""

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
from semiscale.cli.compile import DEFAULT_PIPELINE_YAML
from semiscale.cli.docker_runner import docker_runner
from semiscale.common import parent_exit
from semiscale.common.cpu import available_cpus
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.observability import task_status
from semiscale.observability.progress import parse_failure

PROCESSES = 2  # what kfp.local starts at a time inside a loop
# What is for a cluster alone: retries, for nodes that are lost, and the environment of its pods.
CLUSTER_ONLY_FIELDS = re.compile(r"^( +)(?:retryPolicy|env):\n(?:\1[ -] *.*\n)+", re.MULTILINE)
STAGE_LINE = re.compile(r'^\s*([a-z]+ · |\{"time": )')  # a stage's line, as text or as JSON
ERROR = re.compile(r"^\s*([A-Za-z_.]*(?:Error|Exception)\b.*)")  # the last line of a traceback
MODELS = {
    "teacher": "teacher",
    "baseline": "baseline, same images processed",
    "pretrained": "student before fine-tuning",
    "student": "student after fine-tuning",
}


def run(path: Path, docker: bool = False) -> None:
    """Run a run file's pipeline on this machine and print its results. Finished work is found, not repeated."""
    settings = run_config.load_run_config(path).with_absolute_uris()
    log = log_path(settings)
    task_status.announce_submission(settings.workdir, settings.name)
    run_compiled(settings, log, docker)
    print_results(settings)


def log_path(settings: RunConfig) -> Path:
    """Return where kfp's own chatter goes: beside the report, or under runs/ where the workdir is a bucket."""
    folder = Path("runs") if storage.is_object_store(settings.workdir) else storage.uri_to_path(settings.workdir)
    return folder / settings.name / "local.log"


def run_compiled(settings: RunConfig, log: Path, docker: bool = False) -> None:
    """Run the compiled pipeline. Raises InvalidInputError or SemiscaleError with the line the failed stage left."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cpus() // PROCESSES, 1)))
    # The artifacts are small receipts, which lie in the workdir as well: nothing is lost with this folder.
    with tempfile.TemporaryDirectory(prefix="semiscale-") as root, capture_stdout(log) as screen:
        # GPUs and display names are for the cluster; kfp.local warns of each that it has none.
        warnings.filterwarnings("ignore", message=".*have no effect in the current local runner")
        compiled = CLUSTER_ONLY_FIELDS.sub("", DEFAULT_PIPELINE_YAML.read_text())
        runner = docker_runner(settings, compiled) if docker else local.SubprocessRunner(use_venv=False)
        # What is shared between tasks and what they leave are mounted into each container: two folders.
        local.init(runner, pipeline_root=f"{root}/tasks", workspace_root=f"{root}/workspace")
        pipeline = components.load_component_from_text(compiled)
        try:
            with restore_kfp_globals(), parent_exit.hold_parent_lock(Path(root, "lifeline")):
                pipeline(**settings.form())
        except RuntimeError as error:
            failed = screen.failure or SemiscaleError(f"{screen.error or strip_ansi(str(error))} (see {log})")
            failed.exit_code = failed_task_exit_code(settings, failed)
            raise failed from None


def failed_task_exit_code(settings: RunConfig, failed: SemiscaleError) -> int:
    """Return the exit code of the task that failed so. Its object knows it; a line of text does not."""
    with contextlib.suppress(OSError, SemiscaleError):
        for task in task_status.RunStatusStore(settings.workdir, settings.name).current_tasks():
            if task.exit_code and task.reason == str(failed):
                return task.exit_code
    return failed.exit_code


@contextlib.contextmanager
def restore_kfp_globals() -> Iterator[None]:
    """Undo what kfp.local's two threads leave behind: an indenting `print`, and log handlers of a run that is over."""
    printing, logger = builtins.print, logging.getLogger()
    handlers = list(logger.handlers)
    # Two of its threads may leave none; a message that comes then would go to standard error.
    logger.addHandler(logging.NullHandler())
    try:
        yield
    finally:
        builtins.print = printing
        logger.handlers[:] = handlers


class StageOutputFilter(io.TextIOBase):
    """Standard output during a local run: the stages' own lines are shown, everything goes to the log."""

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log, self._line = screen, log, ""
        self._lock = threading.Lock()  # kfp.local prints from one thread a task
        self.failure: SemiscaleError | None = None  # what a stage's own line says
        self.error = ""  # or else the error that it died of

    def write(self, text: str) -> int:
        with self._lock:
            self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if failed := parse_failure(line.strip()):
                self.failure = self.failure or failed
            elif STAGE_LINE.match(line):
                self._screen.write(line.strip() + "\n")
            elif (found := ERROR.match(line)) and not self.error:
                self.error = found[1]
        self._screen.flush()


@contextlib.contextmanager
def capture_stdout(log: Path) -> Iterator[StageOutputFilter]:
    """Send standard output through a Screen that keeps the whole of it in `log`."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("w")
    except OSError as error:
        raise InvalidInputError(f"workdir: cannot write {log}: {error.strerror}") from None
    with file:
        screen = StageOutputFilter(sys.stdout, file)
        with contextlib.redirect_stdout(screen):
            yield screen


def strip_ansi(text: str) -> str:
    """Remove the colours that kfp writes for terminals."""
    return re.sub(r"\x1b\[\d+m", "", text)


def results(settings: RunConfig) -> dict[str, Any]:
    """Read a finished run's numbers."""
    content: dict[str, Any] = json.loads(
        storage.read_bytes(storage.join(settings.workdir, settings.name, "results.json"))
    )
    return content


def print_results(settings: RunConfig) -> None:
    """Print the result table and where the report is."""
    numbers = results(settings)
    print(f"\n{'on the test set':36}{'top-1':>8}{'top-5':>8}")
    for model, title in MODELS.items():
        print(f"{title:36}{numbers[model]['top1']:8.2%}{numbers[model]['top5']:8.2%}")
    picked = numbers["selection"]
    print(
        f"\n{picked['images']:,} images selected ({picked['unique_images']:,} different) for "
        f"{picked['classes']} classes, {picked['short_classes']} of them short; K = {picked['images_per_class']:,},"
        f" P = {picked['classes_per_image']}"
    )
    print(", ".join(f"{count:,} {what}" for what, count in numbers["ledger"].items()))
    print(f"{'promoted' if numbers['promotion']['promoted'] else 'not promoted'}: {numbers['promotion']['why']}")
    print(f"report: {display_path(storage.join(settings.workdir, settings.name, 'report.html'))}")


def display_path(uri: str) -> str:
    """Return a path relative to where the user stands, where that is shorter."""
    path = Path(uri)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else uri
