"""Stop the stages of a local run when the process that started it ends.

kfp.local starts a stage as a child process by way of a shell. The kernel would let it live on after its parent dies.
The run therefore holds a lock on a file, which the kernel releases when its process ends. Each stage waits for that
lock in a thread of its own. A stage in a container is stopped by its platform and has no lock.
"""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# The environment variable that holds the path of the locked file.
PARENT_LOCK_ENV = "SEMISCALE_LIFELINE"


@contextmanager
def hold_parent_lock(path: Path) -> Iterator[None]:
    """Hold the lock that keeps the stages alive that are started inside the block.

    Ctrl-C and SIGTERM release the lock at once, because kfp.local waits for the stages that run. The block ends after
    they have ended.

    Args:
        path: File to lock. It is created.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. The argument is the number of the signal.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def release_lock(number: int, frame: FrameType | None) -> None:
            fcntl.flock(file, fcntl.LOCK_UN)
            raise KeyboardInterrupt(number)

        os.environ[PARENT_LOCK_ENV] = str(path)
        before = {number: signal.signal(number, release_lock) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt:
            # Each stage shares the lock until it ends, so this waits for all of them.
            fcntl.flock(file, fcntl.LOCK_EX)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            del os.environ[PARENT_LOCK_ENV]


def exit_with_parent() -> None:
    """Send SIGTERM to this process when the run that started it ends."""
    if path := os.environ.get(PARENT_LOCK_ENV):
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
