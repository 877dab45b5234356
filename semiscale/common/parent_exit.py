"""The lifeline from a local run to its stages: a stage ends when the process that started the run does.

kfp.local starts a stage as a plain child, by way of a shell: the kernel would let it live on, even after kill -9 of its
parent. So the run holds a lock on a file, which the kernel releases at the end of the run's process, however it ends;
a stage waits for that lock in a thread of its own. A stage in a container has no lifeline: its platform ends it.
"""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PARENT_LOCK_ENV = "SEMISCALE_LIFELINE"  # the environment's name for the file


@contextmanager
def hold_parent_lock(path: Path) -> Iterator[None]:
    """Keep the stages that are started meanwhile alive.

    Ctrl-C and SIGTERM let go of them at once, because kfp.local waits for those that run, and end when they have; the
    KeyboardInterrupt says by its argument which of the two it was.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def let_go(number: int, frame: FrameType | None) -> None:
            fcntl.flock(file, fcntl.LOCK_UN)
            raise KeyboardInterrupt(number)

        os.environ[PARENT_LOCK_ENV] = str(path)
        before = {number: signal.signal(number, let_go) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt:
            fcntl.flock(file, fcntl.LOCK_EX)  # all stages share the lock by now, until their last moment
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            del os.environ[PARENT_LOCK_ENV]


def exit_with_parent() -> None:
    """Have this process told to stop (SIGTERM) when the run that started it is over; does nothing without a run."""
    if path := os.environ.get(PARENT_LOCK_ENV):
        threading.Thread(target=_stop_at_the_end, args=(path,), daemon=True, name="lifeline").start()


def _stop_at_the_end(path: str) -> None:
    with suppress(FileNotFoundError), Path(path).open() as file:  # gone with a run that ended before we looked
        fcntl.flock(file, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGTERM)
