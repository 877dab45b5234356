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

    The error is raised in the main thread at once. Inside `deferred`, the work checks `is_requested` and calls
    `raise_now` as soon as it can stop.
    """

    def __init__(self) -> None:
        self.is_requested = self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Set `is_requested` instead of raising an error inside the block."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def raise_now(self) -> None:
        """Raise the error that ends the stage.

        Raises:
            TerminatedError: Always.
        """
        raise TerminatedError(
            "SEMI-E002", "SIGTERM: the process was stopped. Finished work is kept. Run it again to continue."
        )

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Record that SIGTERM arrived, and raise TerminatedError unless it is deferred.

        Args:
            number: Number of the signal.
            frame: Frame that the signal interrupted. It is not used.

        Raises:
            TerminatedError: The process is outside of `deferred`.
        """
        self.is_requested = True
        if not self._is_deferred:
            self.raise_now()


@contextmanager
def sigterm_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM inside the block, and restore the earlier handler after it.

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
    """Turn SIGTERM into TerminatedError inside the block."""
    stopping = GracefulStop()
    with sigterm_handler(stopping.handle_signal):
        yield stopping
