"""Test the exit codes of the command line and their lines on standard error.

The tests run real processes.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from semiscale.observability.task_status import RunStatusStore, announce_submission
from tests.support.run_statuses import write_status

ROOT = Path(__file__).resolve().parents[2]
# A busy machine can need this time.
TIMEOUT_S = 300
# Each case has arguments, the status of a task, the exit code, and the start of the line.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], int, str]] = {
    "a run that finished": (("watch",), {"task": "report"}, 0, ""),
    "a run that failed": (
        ("watch",),
        {"task": "merge", "state": "failed", "reason": "a hole", "exit_code": 1},
        1,
        "failed: merge: a hole",
    ),
    "a run whose budget is spent": (
        ("watch",),
        {"task": "score-0", "state": "stopped", "reason": "budget_hours: spent", "exit_code": 3},
        3,
        "failed: score-0: budget_hours: spent",
    ),
    "a run whose Job nobody follows": (
        ("watch",),
        {"task": "score-0", "state": "stopped", "reason": "no task has followed this Job", "exit_code": 4},
        4,
        "failed: score-0: no task has followed",
    ),
    "no server answers": (
        ("submit", "--images-on-nodes", "--host=http://127.0.0.1:1"),
        {},
        1,
        "failed: Kubeflow Pipelines: ",
    ),
    "no server is known": (("cancel",), {}, 2, "refused: --host: "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


def start_verb(folder: Path, name: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start a verb on a new run file, in an environment without a cluster."""
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / "run.yaml"
    uris = dict.fromkeys(("workdir", "labeled", "unlabeled", "test"), f"file://{folder}/{name}")
    path.write_text(yaml.safe_dump({"name": "birds", **uris}))
    verb, *options = arguments
    cluster_variables = ("KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST", "KUBECONFIG")
    environment = {key: value for key, value in os.environ.items() if key not in cluster_variables}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipeline.py"), verb, str(path), *options],
        env={**environment, "HOME": str(folder), "NO_PROXY": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_verb_ends_with_its_exit_code_and_line(folder: Path, name: str) -> None:
    arguments, task, code, line = CASES[name]
    if task:
        write_status(RunStatusStore(f"file://{folder}/{name}", "birds"), started=1.0, updated=2.0, **task)
    with start_verb(folder, name, *arguments) as process:
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, error
    assert error.startswith(line), error
    assert len(error.splitlines()) == (0 if code == 0 else 1)


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (signal.SIGINT, "interrupted", "E400"),
        (signal.SIGTERM, "terminated", "E002"),
        (signal.SIGHUP, "terminated", "E002"),
    ],
)
def test_a_signal_ends_a_verb_with_its_exit_code(folder: Path, number: int, line: str, code: str) -> None:
    """The first process of a container needs a handler.

    The system does not end it by default.
    """
    announce_submission(f"file://{folder}/signal", "birds")
    with start_verb(folder, "signal", "watch", "--every=0.2") as process:
        assert process.stdout
        assert "submitted" in process.stdout.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number
    assert re.fullmatch(rf"{line}: [^\n]* \[SEMI-{code}\]\n", error)


def test_every_documented_exit_code_is_tested() -> None:
    table = (ROOT / "docs" / "command-line.md").read_text().split("meaning\n")[1].split("```")[0]
    tested = {code for *_, code, _ in CASES.values()} | {
        128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    assert {int(line.split()[0]) for line in table.splitlines()} == tested


def test_a_verb_starts_without_torch() -> None:
    """torch takes seconds to import, and most verbs do not need it."""
    loaded = "import sys, semiscale.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "False\n"
