"""Log the progress of long work as text or as JSON.

`SEMISCALE_LOG` selects `plain` or `json`. By default lines are JSON if standard output is not a terminal. The status
object of a task and its metrics also report the latest Progress of the process.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from semiscale.common.errors import InvalidInputError, SemiscaleError, split_error_id
from semiscale.common.text import to_single_line

LOG_INTERVAL_S = 5.0
LOG_FORMAT_ENV = "SEMISCALE_LOG"
# The variable names the file that Kubernetes copies into the status of a pod that has ended.
TERMINATION_LOG_ENV = "SEMISCALE_TERMINATION_LOG"
# Kubernetes keeps this much of the file.
TERMINATION_BYTES = 4096
# The last line of a stage that stops begins like this.
FAILURE = re.compile(r"(refused|failed): (.*)")


def log_info(stage: str, text: str, **numbers: float | str) -> None:
    """Print one line of a stage's log.

    Args:
        stage: Name of the stage.
        text: Message.
        numbers: Additional fields of a JSON line. A line of text does not contain them.
    """
    text = to_single_line(text)
    line = f"{stage} · {text}"
    if use_json_logs(sys.stdout):
        line = _json_line("info", message=text, stage=stage, **numbers)
    _print_line(line, sys.stdout)


def _print_line(line: str, stream: TextIO) -> None:
    """Print a line at once. Nothing is printed, now or later, if nobody reads the stream any more.

    A closed terminal, or a run that was killed, must not cost a stage the work that it is about to save.
    """
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def log_fatal(text: str, exit_code: int) -> None:
    """Print why the program stops to standard error, and write it to the pod's status.

    Args:
        text: Reason, which begins with `refused: ` or `failed: ` and ends with the error's id in brackets.
        exit_code: Exit code of the program.
    """
    # A long text is shortened, but its id must remain.
    error_id, text = split_error_id(text)
    text = to_single_line(text) + (f" [{error_id}]" if error_id else "")
    id_field = {"error_id": error_id} if error_id else {}
    line = _json_line("error", message=text, exit_code=exit_code, **id_field)
    _print_line(line if use_json_logs(sys.stderr) else text, sys.stderr)
    if path := os.environ.get(TERMINATION_LOG_ENV):
        _write_termination_message(Path(path), line.encode())


def _write_termination_message(path: Path, line: bytes) -> None:
    """Write the reason why a pod stops, unless another process has written one.

    The later processes of a pod mostly stop because the first one has ended.
    """
    # The reason is in the log too, so an error of the file is ignored.
    with suppress(OSError):
        if len(line) <= TERMINATION_BYTES and not path.stat().st_size:
            path.write_bytes(line)


def parse_log_line(line: str) -> dict[str, Any]:
    """Return the fields of a log line. A line of text has the field `message` only."""
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    is_log_line = isinstance(fields, dict) and isinstance(fields.get("message"), str)
    return fields if is_log_line else {"message": line}


def parse_failure(line: str) -> SemiscaleError | None:
    """Return the error in the last line of a stage, or None for another line.

    A JSON line contains the exit code. A line of text only distinguishes a refusal from a failure.
    """
    fields = parse_log_line(line)
    match = FAILURE.match(fields["message"])
    if not match:
        return None
    code, message = split_error_id(match[2])
    error = (InvalidInputError if match[1] == "refused" else SemiscaleError)(code, message)
    error.exit_code = fields.get("exit_code", error.exit_code)
    return error


def use_json_logs(stream: TextIO) -> bool:
    """Return whether log lines are JSON.

    SEMISCALE_LOG decides. Without it, lines are JSON if the stream is not a terminal.
    """
    chosen = os.environ.get(LOG_FORMAT_ENV, "")
    return chosen == "json" or (chosen != "plain" and not stream.isatty())


def _json_line(level: str, **fields: float | str) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, **fields}, ensure_ascii=False)


class Progress:
    """Counts finished items and reports the rate, the share and the remaining time.

    Args:
        stage: Name of the stage.
        total: Number of items, or 0 if it is not known.
        clock: Returns seconds. Tests replace it.
        already: Number of items that an earlier process finished. They count as finished, but not for the rate.
        unit: Plural name of the items.
    """

    # The latest Progress of this process. A task counts one kind of item at a time.
    latest: "Progress | None" = None

    def __init__(
        self,
        stage: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        already: int = 0,
        unit: str = "images",
    ) -> None:
        self._stage, self._clock, self._already = stage, clock, already
        self.unit = unit
        self._started = self._logged = clock()
        self.done, self.total, self.detail = already, total, ""
        self.failures = 0
        self.clocks: dict[str, float] = {}
        Progress.latest = self

    def update(self, count: int, detail: str = "") -> None:
        """Count finished items, and log the progress every LOG_INTERVAL_S.

        Args:
            count: Number of items that were finished since the last call.
            detail: Text for the end of the line.
        """
        self.done += count
        self.detail = detail
        now = self._clock()
        if now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            numbers = {"done": self.done, "total": self.total, "per_s": round(self.rate(), 3)}
            log_info(self._stage, self.format(detail), unit=self.unit, **numbers)

    def add_failures(self, images: int) -> None:
        """Count images that cannot be used."""
        self.failures += images

    def add_seconds(self, **seconds: float) -> None:
        """Add seconds to parts of the work, such as read, decode, forward and write.

        The seconds of several threads that work on one part are added up.
        """
        for part, added in seconds.items():
            self.clocks[part] = self.clocks.get(part, 0.0) + added

    @contextmanager
    def timer(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to a part of the work."""
        started = self._clock()
        try:
            yield
        finally:
            self.add_seconds(**{part: self._clock() - started})

    def rate(self) -> float:
        """Return the items per second that this process has finished since its start."""
        return (self.done - self._already) / max(self._clock() - self._started, 1e-9)

    def format(self, detail: str = "") -> str:
        """Return the line: `12,000 of 48,000 images · 25% · 2,400/s · 0:15 left`."""
        return format_progress(self.done, self.total, self.unit, self.rate(), detail)


def format_progress(done: int, total: int, unit: str, per_s: float, detail: str) -> str:
    """Return progress as one line.

    Args:
        done: Number of finished items.
        total: Number of all items. If it is 0, the line has no share and no remaining time.
        unit: Plural name of the items.
        per_s: Finished items per second.
        detail: Text for the end of the line.
    """
    parts = [f"{done:,} {unit}", f"{per_s:,.0f}/s"]
    if total:
        left_s = (total - done) / max(per_s, 1e-9)
        share = f"{done / total:.0%}"
        parts = [f"{done:,} of {total:,} {unit}", share, f"{per_s:,.0f}/s", f"{format_duration(left_s)} left"]
    return " · ".join([*parts, detail] if detail else parts)


def format_duration(seconds: float) -> str:
    """Format seconds as `0:15`, `12:03` or `31:00:00`."""
    whole = max(int(seconds + 0.5), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
