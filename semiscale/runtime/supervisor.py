"""Start a stage again inside its pod when it crashes or hangs.

Kubeflow Pipelines 2.17.0 does not start a container again that failed by itself (docs/kubeflow.md, Retries), and its
launcher replaces the exit code of every stage by 1. The process that kfp starts therefore forks. The child continues as
the stage. The parent waits for it, and forks again after a crash.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from semiscale.common.parent_exit import STOP_SIGNALS
from semiscale.common.prctl import become_subreaper, set_parent_death_signal
from semiscale.config.resources import SUPERVISION_ENV, Supervision
from semiscale.observability.progress import log_info
from semiscale.runtime.shared_work import OBSERVER_ENV

# The command `stop_stage` finds the supervisor of its container by this file.
PID_FILE = Path("/tmp/semiscale-supervisor.pid")  # noqa: S108 - a container's own folder
# The command `stop_stage` asks by this signal to end the stage before Kubernetes ends the container.
SAVE_SIGNAL = signal.SIGUSR1
# The supervisor then waits so long for the end of its container. If it ended first, Argo would see a stage that failed,
# and not a pod that was deleted.
CONTAINER_END_S = 30.0
# A stage that is out of time gets so long to save its work. A checkpoint of the largest network takes most of it.
GRACE_PERIOD_S = 120.0
# The first restart comes at once. Later ones wait longer, because a node or a store may be out of order.
MAX_RESTART_DELAY_S = 60.0
# A crash after such a long time does not count as one of the `restarts`. A training of two weeks may survive many.
HEALTHY_S = 3600.0
_SIGNALS = (signal.SIGCHLD, SAVE_SIGNAL, *STOP_SIGNALS)
_SIGNAL_NAMES = {128 + number: number.name for number in signal.Signals}
_STOPPED_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)


class _Attempt(NamedTuple):
    """The end of one attempt."""

    exit_code: int
    seconds: float
    stopped_by: int
    timed_out: bool

    @property
    def may_succeed_again(self) -> bool:
        """Tell whether another attempt makes sense. It makes none after a refusal, a used-up budget or a stop."""
        if self.stopped_by or (self.exit_code in _STOPPED_EXIT_CODES and not self.timed_out):
            return False
        return self.timed_out or self.exit_code == 1 or self.exit_code >= 128

    def describe(self) -> str:
        """Return how the attempt ended, as a part of a sentence."""
        if self.timed_out:
            return f"was stopped after {self.seconds:.0f} s, because its time was over"
        if self.exit_code in _SIGNAL_NAMES:
            return f"was killed by {_SIGNAL_NAMES[self.exit_code]}"
        return f"failed with exit code {self.exit_code}"


def supervise(stage: str, shares_work: bool) -> None:
    """Continue in a child process, which is started again when it crashes.

    The call returns in the child, once for every attempt. The calling process does not return: it ends with the exit
    code of the last attempt. Without SUPERVISION_ENV in its environment the call does nothing.

    Args:
        stage: Name of the stage, for log lines.
        shares_work: Whether other pods can do the stage's work. When its restarts are used up, the stage then starts
            once more and waits for these pods, so that one broken machine fails no run.
    """
    if not (settings := os.environ.pop(SUPERVISION_ENV, "")):
        return
    policy = Supervision.model_validate_json(settings)
    become_subreaper()
    PID_FILE.write_text(str(os.getpid()))
    # Blocked signals wait until `_wait_for_child` asks for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    failures = 0
    while True:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become_stage()
            return
        attempt = _wait_for_child(child, started + policy.timeout_s)
        _end_orphans()
        if not attempt.may_succeed_again:
            _exit(attempt.exit_code, attempt.stopped_by)
        failures = 1 if attempt.seconds > HEALTHY_S and not attempt.timed_out else failures + 1
        if failures <= policy.restarts:
            delay = min(4.0 ** (failures - 1) - 1, MAX_RESTART_DELAY_S)
            log_info(stage, f"the stage {attempt.describe()}: restart {failures} of {policy.restarts} in {delay:.0f} s")
        elif shares_work and OBSERVER_ENV not in os.environ:
            log_info(stage, f"the stage {attempt.describe()}: no restart is left, other pods take over its work")
            os.environ[OBSERVER_ENV] = "1"
            delay = 0.0
        else:
            _exit(attempt.exit_code)
        if (received := signal.sigtimedwait((SAVE_SIGNAL, *STOP_SIGNALS), delay)) is not None:
            _exit(128 + _to_stop_signal(received.si_signo), received.si_signo)


def _become_stage() -> None:
    """Prepare the child process, so that it handles signals like a process without a supervisor."""
    set_parent_death_signal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _wait_for_child(child: int, deadline: float) -> _Attempt:
    """Wait until the child ends, pass on the signals that stop it, and stop it at its deadline."""
    started = time.monotonic()
    stopped_by, timed_out = 0, False
    while True:
        received = signal.sigtimedwait(_SIGNALS, max(deadline - time.monotonic(), 0))
        if received is None:
            # The second deadline ends the grace period.
            os.kill(child, signal.SIGKILL if timed_out else signal.SIGTERM)
            timed_out, deadline = True, time.monotonic() + GRACE_PERIOD_S
        elif received.si_signo != signal.SIGCHLD:
            stopped_by = received.si_signo
            os.kill(child, _to_stop_signal(stopped_by))
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                exit_code = 128 - code if code < 0 else code
                return _Attempt(exit_code, time.monotonic() - started, stopped_by, timed_out)


def _to_stop_signal(number: int) -> int:
    """Return the signal that the stage gets when the supervisor gets a signal."""
    return signal.SIGTERM if number == SAVE_SIGNAL else number


def _end_orphans() -> None:
    """Kill the processes that a crashed stage left, such as the ranks of a training, which hold the GPUs."""
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _exit(code: int, stopped_by: int = 0) -> NoReturn:
    """End this process without the handlers that belong to the stage.

    Args:
        code: Exit code.
        stopped_by: Signal that stopped the stage. After SAVE_SIGNAL the process first waits for the container's end.
    """
    PID_FILE.unlink(missing_ok=True)
    if stopped_by == SAVE_SIGNAL:
        signal.sigtimedwait(STOP_SIGNALS, CONTAINER_END_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
