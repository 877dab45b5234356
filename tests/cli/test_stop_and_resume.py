"""A local run that a person stops during a training keeps the training: real runs, real signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from semiscale.observability.task_status import RunStatusStore, TaskStatus
from tests.support import sample_images

ROOT = Path(__file__).resolve().parents[2]
# A busy machine can take so long.
TIMEOUT_S = 300
BATCH_SIZE = 12
# The training would take hours.
IMAGES = 10_000_000


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Write the run file of a run whose teacher never ends."""
    content = sample_images.write_run(tmp_path, teacher_images_processed=IMAGES, batch_size=BATCH_SIZE)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(run_file: Path) -> subprocess.Popen[str]:
    """Start a run in its own process group, as a shell does."""
    command = [sys.executable, str(ROOT / "pipeline.py"), "run", run_file.name]
    return subprocess.Popen(
        command, cwd=run_file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def wait_for_steps(run_file: Path, run: subprocess.Popen[str], after: int) -> TaskStatus:
    """Wait until the teacher has processed more images than `after`, and return its status."""
    content = yaml.safe_load(run_file.read_text())
    status_store = RunStatusStore(content["workdir"], content["name"])
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()
        for task in status_store.all_attempts():
            if task.stage == "train" and task.state == "running" and task.done > after:
                return task
        time.sleep(0.2)
    pytest.fail("the training does not advance")


def checkpointed_images(run_file: Path) -> list[int]:
    """Return the images processed at each checkpoint of the run."""
    manifests = run_file.parent.rglob("checkpoints/*.json")
    return sorted(int(path.name.partition("-")[0]) for path in manifests)


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        pytest.param(signal.SIGINT, True, id="Ctrl-C in a terminal"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM to the run"),
        pytest.param(signal.SIGHUP, True, id="closed terminal", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, False, id="killed run", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_saves_a_checkpoint_and_resumes_from_it(run_file: Path, number: int, to_group: bool) -> None:
    run = start(run_file)
    task = wait_for_steps(run_file, run, 0)
    (os.killpg if to_group else os.kill)(run.pid, number)
    _, error = run.communicate(timeout=TIMEOUT_S)
    if number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
        deadline = time.monotonic() + TIMEOUT_S
        while not checkpointed_images(run_file):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    else:
        assert run.returncode == 128 + number
        assert re.fullmatch(r"(interrupted|terminated): [^\n]* \[SEMI-E\d{3}\]\n", error)
    *_, saved = checkpointed_images(run_file)
    assert saved >= task.done, "every image that was reported is in the checkpoint"
    resumed = start(run_file)
    try:
        assert wait_for_steps(run_file, resumed, saved).done > saved
        assert f"going on after {saved:,} images" in (run_file.parent / "work" / "trial" / "local.log").read_text()
    finally:
        os.killpg(resumed.pid, signal.SIGTERM)
        resumed.communicate(timeout=TIMEOUT_S)


def test_a_second_signal_of_the_same_kind_ends_the_run_without_waiting_for_a_step(run_file: Path) -> None:
    run = start(run_file)
    wait_for_steps(run_file, run, 0)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.05)
    run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 128 + signal.SIGINT
