"""Test progress as log lines and as objects in the store, and the budget."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semiscale.common.errors import BudgetExceededError, InvalidInputError, SemiscaleError
from semiscale.common.signals import TerminatedError
from semiscale.observability import budget, status_reporter
from semiscale.observability.progress import Progress, log_fatal, log_info, parse_failure
from semiscale.observability.status_reporter import report_status
from semiscale.observability.task_status import RunStatusStore, TaskStatus
from semiscale.runtime.entrypoints import run_as_task
from semiscale.stages.plan.stage import plan
from tests.support.run_statuses import write_status
from tests.support.stages import Stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _reset_progress() -> Iterator[None]:
    """Remove the counts of other tests."""
    Progress.latest = None
    yield
    Progress.latest = None


class Clock:
    """A clock whose time the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_has_a_line_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("score", 48_000, clock)
    for clock.now in (1.0, 5.0, 9.0):
        progress.update(4_000, "12% of the pool")
    assert (
        capsys.readouterr().out
        == "score · 8,000 of 48,000 images · 17% · 1,600/s · 0:25 left · 12% of the pool\n"
    )  # fmt: skip


def test_lines_are_json_if_the_variable_says_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMISCALE_LOG", "json")
    log_info("merge", "class 'ä' is short", done=3)
    log_fatal("refused: no [SEMI-E100]", 2)
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", line.pop("time"))
    assert line == {"level": "info", "message": "class 'ä' is short", "stage": "merge", "done": 3}
    fatal = json.loads(err)
    assert (fatal["message"], fatal["exit_code"], fatal["error_id"]) == ("refused: no [SEMI-E100]", 2, "SEMI-E100")
    failure = parse_failure(err)
    assert failure
    assert (failure.code, failure.message, failure.exit_code) == ("SEMI-E100", "no", 2)


@pytest.mark.parametrize("log_format", ["", "json"])
def test_a_stage_without_a_terminal_logs_json(tmp_path: Path, log_format: str) -> None:
    """The reason of a failure is also JSON."""
    stages = Stages(tmp_path)
    plan = stages.uri(stages.plan)
    command = [
        sys.executable,
        "-m",
        "semiscale.stages.merge",
        f"--workdir={stages.workdir}",
        f"--plan={plan}",
        "--scores=[]",
    ]
    options = ["--images-per-class=1", "--classes-per-image=1", "--max-failed-fraction=0"]
    environment = {**os.environ, "SEMISCALE_LOG": log_format}
    completed = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert completed.returncode != 0
    (error,) = map(json.loads, completed.stderr.splitlines())
    assert error["level"] == "error"
    (task,) = RunStatusStore(stages.workdir, "trial").current_tasks()
    assert (task.task, task.state, task.exit_code) == ("merge", "failed", completed.returncode)
    assert task.reason
    assert task.reason in error["message"]


def test_a_task_stores_its_progress_and_its_end(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_reporter, "HEARTBEAT_INTERVAL_S", 0.01)
    store = RunStatusStore(bucket, "trial")
    with report_status(store, "pack", "pack"):
        Progress("pack", 10).update(4, "tars")
        running = wait_for_task(store, lambda task: task.done == 4)
    assert (running.state, running.total, running.detail, running.devices) == ("running", 10, "tars", 0)
    assert store.current_tasks()[0].state == "finished"


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (SemiscaleError("SEMI-E000", "a hole in the ledger"), "failed", 1),
        (MemoryError(), "failed", 1),
        (TerminatedError("SEMI-E002", "told to stop"), "stopped", 143),
        (KeyboardInterrupt(), "stopped", 130),
    ],
)
def test_the_status_has_the_reason_of_a_failure(tmp_path: Path, error: BaseException, state: str, code: int) -> None:
    store = RunStatusStore(str(tmp_path), "trial")
    with pytest.raises(type(error)), report_status(store, "merge", "merge"):
        raise error
    (task,) = store.current_tasks()
    assert (task.state, task.exit_code) == (state, code)
    assert task.reason == (str(error) or type(error).__name__)


def test_a_retry_of_kubeflow_repeats_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry reads no input, even if it is repaired.

    A person has to start the run again.
    """
    stages = Stages(tmp_path)
    labeled = Path(stages.config.labeled[0])
    labeled.rename(tmp_path / "elsewhere")
    lines = []
    for index in ("0", "1", "2"):
        monkeypatch.setenv(status_reporter.RETRY_INDEX_ENV, index)
        with pytest.raises(InvalidInputError) as refusal:
            run_as_task(stages.config, plan)
        lines.append(str(refusal.value))
        if index == "0":
            (tmp_path / "elsewhere").rename(labeled)
    assert "nothing here" in lines[0]
    assert lines == lines[:1] * 3
    monkeypatch.setenv(status_reporter.RETRY_INDEX_ENV, "0")
    assert run_as_task(stages.config, plan).name == "trial"


def test_a_retry_after_another_failure_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path)
    monkeypatch.setenv(status_reporter.RETRY_INDEX_ENV, "1")
    store = RunStatusStore(stages.workdir, "trial")
    write_status(store, "plan", started=1000.0, updated=1001.0, state="failed", exit_code=1, reason="the store is gone")
    assert run_as_task(stages.config, plan).name == "trial"


def test_a_training_is_refused_again_without_torch(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"no tensors")
    config = {
        "workdir": stages.workdir,
        "plan": stages.uri(stages.plan),
        "recipe": "teacher",
        "architecture": stages.config.teacher_architecture,
        "images-processed": 24,
        "learning-rate": 1.0,
        "batch-size": 24,
        "device-batch-size": 24,
        "weight-decay": 0.0,
        "resolution": stages.config.resolution,
        "augmentation": stages.config.augmentation,
        "start-weights": tmp_path / "weights.pth",
    }
    command = [sys.executable, "-X", "importtime", "-m", "semiscale.stages.train"]
    lines = []
    for index in ("0", "1"):
        environment = {**os.environ, status_reporter.RETRY_INDEX_ENV: index}
        options = [f"--{name}={value}" for name, value in config.items()]
        completed = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        lines.append(completed.stderr.splitlines()[-1])
        assert completed.returncode == 2, completed.stderr[-500:]
    assert re.match(r"refused: .*weights.pth: .*\[SEMI-E\d+\]$", lines[0])
    assert lines[0] == lines[1]
    assert not re.search(r"\| +torch$", completed.stderr, re.MULTILINE)


def test_a_failing_store_is_reported_once_and_stops_no_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reporter, "HEARTBEAT_INTERVAL_S", 0.01)
    (tmp_path / "progress").write_text("a file where the folder should be")
    with report_status(RunStatusStore(str(tmp_path), "trial"), "merge", "merge"):
        time.sleep(0.1)
    assert capsys.readouterr().out.count("progress cannot be stored, the work goes on") == 1


def test_a_pod_continues_the_status_of_the_pod_that_it_replaces(tmp_path: Path) -> None:
    store = RunStatusStore(str(tmp_path), "trial")
    write_status(store, "plan", started=1000.0, updated=1001.0)
    write_status(store, "score-0", started=1002.0, updated=1010.0, device_s=50.0, state="running")
    write_status(store, "score-1", started=900.0, updated=990.0, device_s=70.0)
    assert [task.task for task in store.current_tasks()] == ["plan", "score-0"], "an earlier attempt's tasks are over"
    with report_status(store, "score-0", "score", on_device=True):
        time.sleep(0.2)
    task = store.current_tasks()[-1]
    assert task.state == "finished"
    assert 50.0 < task.device_s < 60.0


def test_a_launcher_does_not_overwrite_the_status_of_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reporter, "HEARTBEAT_INTERVAL_S", 0.01)
    store = RunStatusStore(str(tmp_path), "trial")
    with report_status(store, "train-teacher-0.1", "train", on_device=True):
        wait_for_task(store, lambda task: task.state == "running")
        # A write that has already begun can overwrite the status. A real worker writes again, and so does this loop.
        for _ in range(20):
            now = time.time() + 1
            write_status(
                store, "train-teacher-0.1", state="running", started=now, updated=now, done=7, total=9, device_s=1e4
            )
            time.sleep(0.05)
            if store.current_tasks()[0].done == 7:
                break
        time.sleep(0.1)
        assert store.current_tasks()[0].done == 7
    (task,) = store.current_tasks()
    assert (task.state, task.done, task.total, task.device_s) == ("finished", 7, 9, 1e4)


def test_a_spent_budget_starts_no_task_on_a_device(tmp_path: Path) -> None:
    store = RunStatusStore(str(tmp_path), "trial")
    write_status(store, "score-0", started=1.0, updated=2.0, device_s=3600.0)
    has_run = False
    with (
        pytest.raises(BudgetExceededError, match=r"SEMI-E003"),
        report_status(store, "score-1", "score", on_device=True, budget_hours=1.0),
    ):
        has_run = True
    assert not has_run
    with report_status(store, "merge", "merge", on_device=False, budget_hours=1.0):
        has_run = True
    assert has_run, "the budget does not limit tasks without a device"


def test_a_budget_that_runs_out_stops_the_work_as_sigterm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_reporter, "HEARTBEAT_INTERVAL_S", 0.01)
    store = RunStatusStore(str(tmp_path), "trial")
    write_status(
        store, "score-0", started=time.time(), updated=time.time(), device_s=3599.5, state="running", devices=1
    )
    terminations = []

    def work() -> None:
        with report_status(store, "score-1", "score", on_device=True, budget_hours=1.0):
            try:
                time.sleep(30)
            except TerminatedError:
                terminations.append(True)
                raise

    started = time.monotonic()
    with pytest.raises(BudgetExceededError, match=r"SEMI-E003"):
        work()
    assert terminations
    assert time.monotonic() - started < 10
    task = store.current_tasks()[-1]
    assert (task.task, task.state, task.exit_code) == ("score-1", "stopped", 3)


def test_a_budget_counts_the_time_of_the_task_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task uses up its budget before its next heartbeat.

    It has not read other statuses or written its own again.
    """
    monkeypatch.setattr(budget, "count_gpus", lambda: 0)
    started = time.monotonic()
    with (
        pytest.raises(BudgetExceededError),
        report_status(
            RunStatusStore(str(tmp_path), "trial"), "train-teacher-1.0", "train", on_device=True, budget_hours=0.0001
        ),
    ):
        time.sleep(30)
    assert time.monotonic() - started < status_reporter.HEARTBEAT_INTERVAL_S


def test_a_killed_task_stays_running_and_a_terminated_task_is_stopped(tmp_path: Path) -> None:
    script = (
        "from semiscale.observability.status_reporter import report_status\n"
        "from semiscale.observability.task_status import RunStatusStore\nimport time, sys\n"
        "with report_status(RunStatusStore(sys.argv[1], 'trial'), 'pack', 'pack'):\n    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    for number, state in ((signal.SIGKILL, "running"), (signal.SIGTERM, "stopped")):
        store = RunStatusStore(str(tmp_path), "trial")
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            wait_for_task(store, lambda task: task.state == "running")
            process.send_signal(number)
        assert store.current_tasks()[0].state == state


def wait_for_task(store: RunStatusStore, ready: Any) -> TaskStatus:
    """Wait until the only task of a run meets a condition, and return its status."""
    deadline = time.monotonic() + 60
    while not (tasks := store.current_tasks()) or not ready(tasks[0]):
        assert time.monotonic() < deadline, f"timeout: {tasks}"
        time.sleep(0.05)
    return tasks[0]
