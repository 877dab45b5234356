"""Handle the signals by which a platform or a person stops a process: SIGTERM and Ctrl-C (SIGINT)."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from semiscale.common.errors import SemiscaleError

# The id of the error that a signal stopped a process.
TERMINATED_ID = "SEMI-E002"

Handler = Callable[[int, FrameType | None], None]


class TerminatedError(SemiscaleError):
    """A signal stopped the process. Finished work is kept. The exit code is 130 after SIGINT."""

    exit_code = 128 + signal.SIGTERM


class GracefulStop:
    """Turns SIGTERM and SIGINT into TerminatedError.

    The error is raised in the main thread at once. Inside `deferred`, the work checks `is_requested` and calls
    `raise_now` as soon as it can stop. A second Ctrl-C is not deferred.
    """

    def __init__(self) -> None:
        self.is_requested = self._is_deferred = False
        self._number = signal.SIGTERM

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
        error = TerminatedError(
            TERMINATED_ID,
            f"{self._number.name}: the process was stopped. Finished work is kept. Run it again to continue.",
        )
        error.exit_code = 128 + self._number
        raise error

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Record that a signal arrived, and raise TerminatedError unless it is deferred.

        Args:
            number: Number of the signal.
            frame: Frame that the signal interrupted. It is not used.

        Raises:
            TerminatedError: The process is outside of `deferred`, or a person insists with a second Ctrl-C.
        """
        insists = self.is_requested and number == self._number == signal.SIGINT
        # The ranks of a local training get SIGINT from the terminal and then SIGTERM from torchrun.
        if not self.is_requested:
            self.is_requested, self._number = True, signal.Signals(number)
        if insists or not self._is_deferred:
            self.raise_now()


@contextmanager
def signal_handler(handler: Handler, *numbers: int) -> Iterator[None]:
    """Handle signals inside the block, and restore the earlier handlers after it.

    A signal that the process ignores stays ignored, as `nohup` and background jobs of a shell require. The first
    process of a container ignores SIGTERM without a handler.

    Args:
        handler: Handler for all of the signals.
        numbers: Numbers of the signals.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]
    try:
        for number in handled:
            signal.signal(number, handler)
    # Only the main thread can set a handler. Tests and notebooks stop their work in another way.
    except ValueError:
        handled = []
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextmanager
def graceful_stop() -> Iterator[GracefulStop]:
    """Turn SIGTERM and SIGINT into TerminatedError inside the block."""
    stopping = GracefulStop()
    with signal_handler(stopping.handle_signal, signal.SIGTERM, signal.SIGINT):
        yield stopping
