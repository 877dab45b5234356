"""Says how far long work is: one line every few seconds, the same in a pod's log and in a terminal's scrollback."""

import sys
import time
from collections.abc import Callable

LINE_EVERY_S = 5.0


def say(stage: str, text: str) -> None:
    """Print one line of a stage's log."""
    print(f"{stage} · {text}", flush=True)


class Progress:
    """Counts finished images against a total and reports rate, percent and time left.

    `clock` returns seconds and is a parameter so that a test can drive it.
    """

    def __init__(self, stage: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stage, self._total, self._clock = stage, total, clock
        self._started = self._said = clock()
        self._done = 0

    def add(self, images: int, detail: str = "") -> None:
        """Count finished images and, when it is time, say so."""
        self._done += images
        now = self._clock()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            say(self._stage, self.line(detail))

    def line(self, detail: str = "") -> str:
        """Return the line: `12,000 of 48,000 images · 25% · 2,400/s · 0:15 left`."""
        rate = self._done / max(self._clock() - self._started, 1e-9)
        parts = [f"{self._done:,} images", f"{rate:,.0f}/s"]
        if self._total:
            left_s = (self._total - self._done) / max(rate, 1e-9)
            parts = [
                f"{self._done:,} of {self._total:,} images",
                f"{self._done / self._total:.0%}",
                f"{rate:,.0f}/s",
                f"{duration(left_s)} left",
            ]
        return " · ".join([*parts, detail] if detail else parts)


def duration(seconds: float) -> str:
    """Format seconds as `0:15`, `12:03` or `31:00:00`."""
    whole = max(int(seconds + 0.5), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def fail(text: str) -> None:
    """Print the one line that says why the program stops, to standard error."""
    print(text, file=sys.stderr, flush=True)
