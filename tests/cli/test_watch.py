"""Test the output and the exit code of the verb `watch`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from semiscale import storage
from semiscale.cli.main import main
from semiscale.cli.watch import ABANDONED_AFTER_S, render, terminal_task, watch
from semiscale.common.errors import InvalidInputError
from semiscale.observability.task_status import RunStatusStore, TaskStatus, announce_submission
from tests.support import sample_images
from tests.support.run_statuses import running_task, write_status

ROOT = Path(__file__).resolve().parents[2]


def test_the_output_has_a_line_for_each_task() -> None:
    tasks = [
        running_task("plan", state="finished", done=20, updated=1003.0),
        running_task("score-0", done=8_000, total=48_000, per_s=1600.0, detail="12% of the pool", device_s=1800.0),
        running_task("score-1", done=500, per_s=100.0, updated=1060.0),
        running_task("train-baseline-0.1", state="failed", reason="the loss is nan"),
        running_task("merge"),
    ]
    assert render("birds", tasks, 1100.0, 200).splitlines() == [
        "birds: 1 finished, 3 running, 1 failed · 1:40 · 0.50 device-hours",
        "plan                finished · 20 images · 0:03",
        "score-0             ███░░░░░░░░░░░░░░░░░ 8,000 of 48,000 images · 17% · 1,600/s · 0:25 left · 12% of the pool",
        "score-1             500 images · 100/s · silent for 0:40",
        "train-baseline-0.1  failed: the loss is nan",
        "merge               running",
    ]
    assert all(len(line) <= 40 for line in render("birds", tasks, 1100.0, 40).splitlines())


@pytest.mark.parametrize(
    ("tasks", "now", "code"),
    [
        ([], 0.0, None),
        ([running_task("plan", state="submitted")], 9999.0, None),
        ([running_task("report", state="finished")], 1101.0, 0),
        ([running_task("plan", state="failed", exit_code=2)], 1101.0, 2),
        ([running_task("score-0", state="failed", exit_code=1), running_task("score-1")], 1150.0, None),
        ([running_task("score-0", state="failed", exit_code=1)], 1150.0, None),
        ([running_task("score-0", state="failed", exit_code=1)], 1300.0, 1),
        ([running_task("score-0", state="stopped", exit_code=143), running_task("merge")], 1300.0, 143),
        ([running_task("score-0"), running_task("score-1", updated=1200.0)], 1300.0, None),
        ([running_task("score-0", state="finished")], 99999.0, None),
    ],
)
def test_the_last_task_decides_when_a_run_has_ended(tasks: list[TaskStatus], now: float, code: int | None) -> None:
    task = terminal_task(tasks, now)
    assert (task.exit_code if task else None) == code


def test_a_run_whose_only_pod_was_killed_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sample_images.write_run(tmp_path)))
    long_ago = time.time() - ABANDONED_AFTER_S - 1
    store = RunStatusStore(str(tmp_path / "work"), "trial")
    write_status(store, "plan", state="running", started=long_ago, updated=long_ago)
    for once in ([], ["--once"]):
        assert main(pipeline.semiscale, ["watch", str(path), *once]) == 1
        assert "plan: Silent for 3:0" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sample_images.write_run(tmp_path)))
    with pytest.raises(InvalidInputError, match=r"SEMI-E410"):
        watch(path, once=True, every_s=1)
    store = RunStatusStore(str(tmp_path / "work"), "trial")
    announce_submission(str(tmp_path / "work"), "trial")
    watch(path, once=True, every_s=1)
    assert "waiting for a pod" in capsys.readouterr().out
    write_status(
        store, "score-0", state="failed", reason="budget", exit_code=3, started=time.time(), updated=time.time() + 1
    )
    # The pod of a failed task may be started again.
    watch(path, once=True, every_s=1)
    write_status(
        store, "plan", state="failed", reason="no class", exit_code=2, started=time.time(), updated=time.time() + 1
    )
    assert main(pipeline.semiscale, ["watch", str(path)]) == 2
    assert capsys.readouterr().err == "failed: plan: no class [SEMI-E411]\n"
    write_status(
        store,
        "plan",
        state="failed",
        reason="no class [SEMI-E051]",
        exit_code=2,
        started=time.time(),
        updated=time.time() + 2,
    )
    assert main(pipeline.semiscale, ["watch", str(path)]) == 2
    assert capsys.readouterr().err == "failed: plan: no class [SEMI-E051]\n"


def test_a_real_run_is_followed_from_a_bucket_while_its_pod_is_killed_and_replaced(
    tmp_path: Path, s3_bucket: str
) -> None:
    """The stage runs in its own process, as in a pod.

    `watch` runs in another process and ends with the run.
    """
    content = {**sample_images.write_run(tmp_path), "workdir": f"{s3_bucket}/work"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    announce_submission(f"{s3_bucket}/work", "trial")
    command = [sys.executable, str(ROOT / "pipeline.py"), "watch", str(path), "--every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as watching:
        assert watching.stdout
        first = watching.stdout.readline() + watching.stdout.readline()
        run_plan_stage(content, killed=True)
        run_plan_stage(content, killed=False)
        write_status(
            RunStatusStore(f"{s3_bucket}/work", "trial"), "report", started=time.time(), updated=time.time() + 1
        )
        out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert "waiting for a pod" in first
    assert "plan    finished" in out
    assert storage.head(f"{s3_bucket}/work/progress/trial/plan.json")


def run_plan_stage(content: dict[str, Any], killed: bool) -> None:
    """Run the plan stage in its own process, and kill it after its first status."""
    options = [f"--{key.replace('_', '-')}={format_value(value)}" for key, value in content.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "semiscale.stages.plan", *options], stdout=subprocess.DEVNULL
    ) as process:
        store = RunStatusStore(str(content["workdir"]), str(content["name"]))
        while killed and process.poll() is None and not store.current_tasks():
            time.sleep(0.05)
        if killed:
            process.send_signal(signal.SIGKILL)


def format_value(value: Any) -> str:
    """Format a value for the command line of a stage."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
