"""What can be watched of a training: a line of log, JSON lines for machines, event files for TensorBoard."""

import json
import re
import secrets
import time
from collections.abc import Callable

from semiscale import storage
from semiscale.observability.progress import LOG_INTERVAL_S, Progress, log_info
from semiscale.stages.train import tensorboard

FLUSH_EVERY_S = 60.0
_EVENTS = re.compile(r"/events\.out\.tfevents\.(\d{17})\.[^/]+$")


class AppendOnlyFile:
    """A file that grows: appended to on a disk; an object store has no appending, there it is written anew.

    Memory: what it holds; a day of one line in five seconds is 3 MB.
    """

    def __init__(self, uri: str, content: bytes = b"") -> None:
        self._uri, self._content, self._written = uri, content, 0

    def add(self, data: bytes) -> None:
        """Append, for now in memory."""
        self._content += data

    def flush(self) -> None:
        """Bring it to where it is read. The first time it replaces what was there."""
        if storage.is_object_store(self._uri) or not self._written:
            storage.write_bytes(self._uri, self._content)
        else:
            with storage.uri_to_path(self._uri).open("ab") as file:
                file.write(self._content[self._written :])
        self._written = len(self._content)


class MetricsLogger:
    """Tells how a training goes. Times are of this process; images are of the whole training.

    The line names the recipe: on one machine several trainings may write into one log.

    `clock` returns seconds and is a parameter so that a test can drive it.
    """

    def __init__(
        self, folder: str, recipe: str, total: int, already: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._recipe, self._images, self._already, self._clock = recipe, already, already, clock
        self._started = self._recorded = self._flushed = clock()
        self._waited_s = 0.0
        self._detail = ""
        uri = storage.join(folder, "metrics.jsonl")
        self._metrics = AppendOnlyFile(uri, _lines_before(uri, already))
        self._events = AppendOnlyFile(
            _new_events(folder), tensorboard.file_header_record() + tensorboard.session_start_record(already + 1)
        )
        self._progress = Progress("train", total, clock, already)

    def log_step(self, images: int, rate: float, loss: Callable[[], float], waited_s: float) -> None:
        """Count a step of so many images, and what has become known of the device's waiting for data.

        The loss is asked for only when it is told, as that waits for the device.
        """
        self._images += images
        self._waited_s += waited_s
        self._progress.add_seconds(wait=waited_s)
        if self._clock() - self._recorded >= LOG_INTERVAL_S:
            self.log({"loss": loss(), "learning_rate": rate})
        self._progress.update(images, self._detail)

    def log(self, values: dict[str, float]) -> None:
        """Keep values at this moment for machines and, where they are of a step, for the next line of the log."""
        now = self._clock()
        self._recorded = now
        elapsed_s = max(now - self._started, 1e-9)
        values = {
            **values,
            "images_per_s": (self._images - self._already) / elapsed_s,
            "waiting_for_data": self._waited_s / elapsed_s,
        }
        if "loss" in values:
            self._detail = (
                f"{self._recipe} · loss {values['loss']:.3f} · learning rate {values['learning_rate']:.3g} · "
                f"{values['waiting_for_data']:.0%} waiting for data"
            )
        line = {"images_processed": self._images, "seconds": round(elapsed_s, 3), **values}
        self._metrics.add(json.dumps(line).encode() + b"\n")
        self._events.add(tensorboard.scalars_record(self._images, values))
        if now - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Bring the files up to date."""
        self._flushed = self._clock()
        self._metrics.flush()
        self._events.flush()


def _new_events(folder: str) -> str:
    """Name an event file so that it is the last by name: TensorBoard reads them in that order, and so forgets what was
    recorded past the checkpoint. Microseconds, but one more than the last file's where the clock was set back.
    """
    before = [int(found[1]) for entry in storage.list_objects(folder) if (found := _EVENTS.search(entry.uri))]
    now = max(time.time_ns() // 1000, *(number + 1 for number in before), 0)
    return storage.join(folder, f"events.out.tfevents.{now:017}.{secrets.token_hex(4)}")


def _lines_before(uri: str, images: int) -> bytes:
    """Return the lines of a process before this one, without those past the checkpoint that this one goes on from."""
    if not images:
        return b""
    lines = (storage.read_or_none(uri) or b"").splitlines(keepends=True)
    counted = [(line, _images_of(line)) for line in lines]
    if torn := sum(count is None for _, count in counted):
        log_info("train", f"{uri}: {torn} of {len(lines)} lines are torn, and are left out")
    return b"".join(line for line, count in counted if count is not None and count <= images)


def _images_of(line: bytes) -> int | None:
    """Return the images processed that a line is of; None of one that was cut off, or that another process wrote into:
    where a pod is replaced two may be at one training for a moment.
    """
    try:
        return int(json.loads(line)["images_processed"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None
