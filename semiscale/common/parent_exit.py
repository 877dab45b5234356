"""Stop the stages of a local run when the process that started it is stopped or ends.

kfp.local starts a stage as a child process by way of a shell, or as a container. The kernel would let it live on after
its parent dies. The run therefore holds a lock on a file, which the kernel releases when its process ends. Each stage
waits for that lock in a thread of its own. A container mounts the file.
"""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from semiscale.common.signals import signal_handler

# The environment variable that holds the path of the locked file.
PARENT_LOCK_ENV = "SEMISCALE_LIFELINE"
# A person or a service manager stops a run by these. A terminal sends SIGHUP when it is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def hold_parent_lock(path: Path) -> Iterator[None]:
    """Hold the lock that keeps the stages alive that are started inside the block.

    A signal releases the lock at once, so that the running stages save their work and end. The block continues, because
    it has to read the output of the stages until then. A second signal of the same kind interrupts the block.

    Args:
        path: File to lock. It is created.

    Raises:
        KeyboardInterrupt: A signal arrived. It is raised when the block and all stages have ended. The argument is the
            number of the signal.
    """
    received: list[int] = []
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def release_lock(number: int, frame: FrameType | None) -> None:
            if number in received:
                raise KeyboardInterrupt(number)
            received.append(number)
            fcntl.flock(file, fcntl.LOCK_UN)

        os.environ[PARENT_LOCK_ENV] = str(path)
        try:
            with signal_handler(release_lock, *STOP_SIGNALS):
                yield
        # The failure of the block is that its stages were stopped.
        except Exception:
            if not received:
                raise
        finally:
            del os.environ[PARENT_LOCK_ENV]
            if received:
                # Each stage shares the lock until it ends, so this waits for all of them.
                fcntl.flock(file, fcntl.LOCK_EX)
    if received:
        raise KeyboardInterrupt(received[0])


def exit_with_parent() -> None:
    """Send SIGTERM to this process when the run that started it is stopped or ends.

    A terminal sends Ctrl-C to the run and to its stages. The stages leave it to the run, which stops them in time.
    """
    if path := os.environ.get(PARENT_LOCK_ENV):
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_stop_when_released, args=(path,), daemon=True, name="parent lock").start()


def _stop_when_released(path: str) -> None:
    """Wait until the lock is released, then stop this process."""
    # The file is missing if the run has ended already.
    with suppress(FileNotFoundError), Path(path).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGTERM)
        # Keep the shared lock until this process has ended, because the parent waits for it.
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGTERM)
