"""SIGTERM: how a pod is told to stop, some seconds before it is killed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from semiscale.common.errors import SemiscaleError


class TerminatedError(SemiscaleError):
    """The process was told to stop. What was finished is kept."""

    exit_code = 128 + signal.SIGTERM


class GracefulStop:
    """Whether this process was told to stop.

    Raises TerminatedError in the main thread at once, or, while the work is `held`, leaves it to the work to ask
    `asked` at a
    moment that suits it, and to call `stop`.
    """

    def __init__(self) -> None:
        self.asked = self._held = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the work ask by itself."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def raise_now(self) -> None:
        """Raise TerminatedError."""
        raise TerminatedError(
            "SEMI-E002", "SIGTERM: the process was stopped. Finished work is kept. Run it again to continue."
        )

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.asked = True
        if not self._held:
            self.raise_now()


@contextmanager
def sigterm_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have SIGTERM handled for the time of the block: the first process of a container would not hear of it else."""
    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: a test or a notebook, which has its own way to stop
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def graceful_stop() -> Iterator[GracefulStop]:
    """Turn SIGTERM into TerminatedError for the time of the block."""
    stopping = GracefulStop()
    with sigterm_handler(stopping.handle_signal):
        yield stopping
