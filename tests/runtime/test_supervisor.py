"""Test the supervisor with real processes: crashes, signals, time-outs and the processes that a crash leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semiscale.config.resources import SUPERVISION_ENV, Supervision
from semiscale.runtime.shared_work import OBSERVER_ENV
from tests.support.processes import has_ended

TIMEOUT_S = 60
# The stage of these tests. It notes each attempt, and ends it by the next one of the given actions.
STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from semiscale.runtime import supervisor

folder, actions, shares_work, patches = Path(sys.argv[1]), sys.argv[2].split(","), bool(int(sys.argv[3])), sys.argv[4:]
supervisor.PID_FILE = folder / "supervisor.pid"
supervisor.MAX_RESTART_DELAY_S = 0.0
supervisor.GRACE_PERIOD_S = 0.5
for patch in patches:
    name, _, value = patch.partition("=")
    setattr(supervisor, name, float(value))
supervisor.supervise("score", shares_work)
attempts = sorted(folder.glob("attempt-*"))
(folder / f"attempt-{len(attempts)}").write_text(f"{os.getpid()} {os.environ.get('SEMISCALE_OBSERVER', '')}")
action = actions[len(attempts)]
if action == "orphan":
    (folder / "orphan").write_text(str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))
    os.kill(os.getpid(), signal.SIGKILL)
elif action.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, action))
elif action == "raise":
    raise RuntimeError("CUDA error")
elif action == "hang":
    time.sleep(600)
elif action == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").touch()
    time.sleep(600)
elif action == "stoppable":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "ready").touch()
    time.sleep(600)
else:
    sys.exit(int(action))
"""


def start(
    folder: Path, *actions: str, restarts: int = 2, timeout_s: float = 600, shares_work: bool = False, patches: str = ""
) -> subprocess.Popen[str]:
    """Start a supervised stage whose attempts end by these actions."""
    environment = {**os.environ, SUPERVISION_ENV: Supervision(restarts=restarts, timeout_s=timeout_s).model_dump_json()}
    command = [sys.executable, "-c", STAGE, str(folder), ",".join(actions), str(int(shares_work)), *patches.split()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *actions: str, **options: object) -> tuple[int, list[str]]:
    """Run a supervised stage to its end, and return its exit code and the lines of its log."""
    process = start(folder, *actions, **options)  # type: ignore[arg-type]
    output, error = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, [line for line in (output + error).splitlines() if "the stage" in line]


def count_attempts(folder: Path) -> int:
    """Return how often the stage was started."""
    return len(list(folder.glob("attempt-*")))


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("crash", ["SIGKILL", "SIGSEGV", "SIGABRT", "raise", "1", "137", "255"])
def test_a_stage_that_crashes_starts_again(tmp_path: Path, crash: str) -> None:
    code, lines = run(tmp_path, crash, crash, "0")
    assert code == 0
    assert count_attempts(tmp_path) == 3
    assert len(lines) == 2
    assert "restart 2 of 2" in lines[1]


@pytest.mark.parametrize("final", [2, 3, 129, 130, 143])
def test_a_refusal_a_used_up_budget_and_a_stop_are_final(tmp_path: Path, final: int) -> None:
    assert run(tmp_path, str(final), "0") == (final, [])
    assert count_attempts(tmp_path) == 1


@pytest.mark.parametrize(("crash", "code"), [("1", 1), ("SIGKILL", 137)])
def test_the_last_crash_gives_the_exit_code(tmp_path: Path, crash: str, code: int) -> None:
    assert run(tmp_path, *[crash] * 3)[0] == code
    assert count_attempts(tmp_path) == 3


def test_a_crash_after_a_long_time_uses_up_no_restart(tmp_path: Path) -> None:
    actions = ["SIGKILL"] * 5
    assert run(tmp_path, *actions, "0", patches="HEALTHY_S=0")[0] == 0
    assert count_attempts(tmp_path) == 6


def test_a_stage_that_shares_its_work_ends_as_an_observer(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "SIGKILL", "SIGKILL", "0", restarts=1, shares_work=True)
    assert code == 0
    assert "other pods take over" in lines[-1]
    observers = [path.read_text().split()[1:] for path in sorted(tmp_path.glob("attempt-*"))]
    assert observers == [[], [], ["1"]]


def test_an_observer_that_crashes_is_not_started_again(tmp_path: Path) -> None:
    assert run(tmp_path, "SIGKILL", "1", restarts=0, shares_work=True)[0] == 1
    assert count_attempts(tmp_path) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_stage_and_is_final(tmp_path: Path, number: signal.Signals) -> None:
    terminates = number == signal.SIGTERM
    process = start(tmp_path, "stoppable" if terminates else "hang", "0")
    wait_for(tmp_path / ("ready" if terminates else "attempt-0"))
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number
    assert count_attempts(tmp_path) == 1


def test_a_stage_that_is_out_of_time_is_stopped_and_starts_again(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "ignore", "stoppable", "0", timeout_s=1.5)
    assert code == 0
    assert [" was stopped after " in line for line in lines] == [True, True]
    assert count_attempts(tmp_path) == 3


def test_the_processes_of_a_crashed_stage_end_before_the_next_attempt(tmp_path: Path) -> None:
    assert run(tmp_path, "orphan", "0")[0] == 0
    assert has_ended(int((tmp_path / "orphan").read_text()))


def test_a_stage_ends_with_its_supervisor(tmp_path: Path) -> None:
    process = start(tmp_path, "stoppable", "0")
    wait_for(tmp_path / "ready")
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    stage = int((tmp_path / "attempt-0").read_text())
    deadline = time.monotonic() + TIMEOUT_S
    while not has_ended(stage):
        assert time.monotonic() < deadline
        time.sleep(0.02)


STOP = """
import sys
from pathlib import Path
from semiscale.runtime import stop_stage
stop_stage.PID_FILE = Path(sys.argv[1])
stop_stage.stop_stage()
"""


def test_the_hook_of_kubernetes_waits_until_the_stage_has_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "stoppable", "0")
    wait_for(tmp_path / "ready")
    stage = int((tmp_path / "attempt-0").read_text())
    subprocess.run([sys.executable, "-c", STOP, str(tmp_path / "supervisor.pid")], check=True, timeout=TIMEOUT_S)
    assert has_ended(stage)
    assert process.poll() is None, "Argo would see a stage that failed, and not a pod that was deleted"
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert count_attempts(tmp_path) == 1
    # Nothing runs any more.
    subprocess.run([sys.executable, "-c", STOP, str(tmp_path / "supervisor.pid")], check=True, timeout=TIMEOUT_S)


def test_a_stage_without_supervision_runs_in_its_own_process(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (SUPERVISION_ENV, OBSERVER_ENV)}
    command = [sys.executable, "-c", STAGE, str(tmp_path), "0", "0"]
    with subprocess.Popen(command, env=environment) as process:
        process.wait(TIMEOUT_S)
    assert process.returncode == 0
    assert int((tmp_path / "attempt-0").read_text()) == process.pid


def test_the_settings_of_a_pod_are_plain_json() -> None:
    assert json.loads(Supervision(restarts=3, timeout_s=60).model_dump_json()) == {"restarts": 3, "timeout_s": 60}
