"""Handle SIGTERM, by which a platform stops a pod shortly before it kills it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from semiscale.common.errors import SemiscaleError


class TerminatedError(SemiscaleError):
    """SIGTERM stopped the process. Finished work is kept."""

    exit_code = 128 + signal.SIGTERM


class GracefulStop:
    """Turns SIGTERM into TerminatedError.

    The error is raised in the main thread at once. Inside `deferred`, the work checks `asked` itself and calls
    `raise_now` when it is ready to stop.
    """

    def __init__(self) -> None:
        self.asked = self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave it to the work to check `asked`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def raise_now(self) -> None:
        """Raise TerminatedError."""
        raise TerminatedError(
            "SEMI-E002", "SIGTERM: the process was stopped. Finished work is kept. Run it again to continue."
        )

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.asked = True
        if not self._is_deferred:
            self.raise_now()


@contextmanager
def sigterm_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM inside the block.

    The first process of a container ignores SIGTERM without a handler.
    """
    try:
        before = signal.signal(signal.SIGTERM, handler)
    # Only the main thread can set a handler. Tests and notebooks stop their work in another way.
    except ValueError:
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
