"""Test that a killed or interrupted local run leaves no stage behind.

The tests send real signals to real runs.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support import sample_images
from tests.support.stages import Stages

ROOT = Path(__file__).resolve().parents[2]
# A busy machine can need this time.
TIMEOUT_S = 300

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that will score a large pool on two pods."""
    root = tmp_path_factory.mktemp("run")
    pool = [str(sample_images.write_pool(root / "large", 40, 400))]
    stages = Stages(root, unlabeled=pool, baseline_learning_rates=[1.0])
    assert stages.teacher
    assert stages.train("baseline", learning_rate=1.0, epochs=stages.config.finetune_epochs)
    (root / "run.yaml").write_text(yaml.safe_dump(stages.content))
    return root


def start_run(root: Path) -> subprocess.Popen[str]:
    """Start a run in its own process group, as a shell does."""
    command = [sys.executable, str(ROOT / "pipeline.py"), "run", "run.yaml"]
    environment = {**os.environ, "TMPDIR": str(root)}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def stages_in(root: Path, stage: str = "") -> list[int]:
    """Return the ids of the processes of a run's stages, or of one stage, with shells.

    The environment of these processes names the lock of the run.
    """
    process_ids = []
    for folder in Path("/proc").iterdir():
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except (NotADirectoryError, FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        is_of_run = f"SEMISCALE_LIFELINE={root}".encode() in environment
        if is_of_run and f"--function_to_execute\0{stage}".encode() in command:
            process_ids.append(int(folder.name))
    return process_ids


def wait_until_running(is_running: bool, root: Path, stage: str = "") -> None:
    """Wait until a stage runs, or until no stage runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while bool(stages_in(root, stage)) != is_running:
        assert time.monotonic() < deadline, f"{stage or 'stages'}: {stages_in(root)}"
        time.sleep(0.05)


@pytest.mark.parametrize("stage", [pytest.param("plan", marks=pytest.mark.slow), "score"])
def test_no_stage_outlives_a_run_that_was_killed(scoring: Path, stage: str) -> None:
    run = start_run(scoring)
    wait_until_running(True, scoring, stage)
    run.kill()
    run.communicate()
    wait_until_running(False, scoring)


@pytest.mark.parametrize(
    ("stage", "to_group", "number"),
    [
        pytest.param("plan", False, signal.SIGINT, id="one stage, signal to the run alone"),
        pytest.param("plan", False, signal.SIGTERM, id="one stage, signal as by kill"),
        pytest.param("score", True, signal.SIGINT, id="two at once, signal as by a terminal"),
        pytest.param("score", False, signal.SIGINT, id="two at once, signal to the run alone", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_reports_the_signal_in_one_line(
    scoring: Path, stage: str, to_group: bool, number: int
) -> None:
    run = start_run(scoring)
    wait_until_running(True, scoring, stage)
    (os.killpg if to_group else os.kill)(run.pid, number)
    _, error = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 128 + number
    reason, code = ("interrupted", "E400") if number == signal.SIGINT else ("terminated", "E002")
    assert re.fullmatch(rf"{reason}: [^\n]* \[SEMI-{code}\]\n", error)
    # A stage that is still starting ends as soon as it has started.
    wait_until_running(False, scoring)
