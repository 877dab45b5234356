"""Report a training while it runs.

It writes a log line, JSON lines for machines and event files for TensorBoard.
"""

import json
import re
import secrets
import time
from collections.abc import Callable

from semiscale import storage
from semiscale.observability import tensorboard
from semiscale.observability.progress import LOG_INTERVAL_S, Progress, log_info

FLUSH_EVERY_S = 60.0
_EVENTS = re.compile(r"/events\.out\.tfevents\.(\d{17})\.[^/]+$")


class AppendOnlyFile:
    """A file that grows.

    On a disk, new bytes are appended. An object store cannot append, so each flush writes the whole object.

    Args:
        uri: The file.
        content: Bytes that it begins with.

    Cost:
        Memory for the whole content. One line in five seconds is 3 MB a day.
    """

    def __init__(self, uri: str, content: bytes = b"") -> None:
        self._uri, self._content, self._written = uri, content, 0

    def append(self, data: bytes) -> None:
        """Append bytes in memory, until the next flush."""
        self._content += data

    def flush(self) -> None:
        """Write the new bytes. The first flush replaces an older file."""
        if storage.is_object_store(self._uri) or not self._written:
            storage.write_bytes(self._uri, self._content)
        else:
            with storage.uri_to_path(self._uri).open("ab") as file:
                file.write(self._content[self._written :])
        self._written = len(self._content)


class MetricsLogger:
    """Log the metrics of a training.

    Times are those of this process. Images are those of the whole training. The log line names the recipe, because
    several trainings on one machine may write to one log.

    Args:
        folder: URI of the training's folder, where the files are written.
        recipe: Name of the recipe.
        total: Images of the whole training.
        already: Images that earlier processes have processed, up to the checkpoint.
        clock: Returns seconds. Tests replace it.
    """

    def __init__(
        self, folder: str, recipe: str, total: int, already: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._recipe, self._images, self._already, self._clock = recipe, already, already, clock
        self._started = self._recorded = self._flushed = clock()
        self._stall_s = 0.0
        self._detail = ""
        uri = storage.join(folder, "metrics.jsonl")
        self._metrics = AppendOnlyFile(uri, _read_lines_until(uri, already))
        self._events = AppendOnlyFile(
            _new_event_file_uri(folder),
            tensorboard.file_header_record() + tensorboard.session_start_record(already + 1),
        )
        self._progress = Progress("train", total, clock, already)

    def log_step(self, images: int, rate: float, loss: Callable[[], float], stall_s: float) -> None:
        """Count a step, and log its metrics every LOG_INTERVAL_S.

        Args:
            images: Images of the step.
            rate: Learning rate of the step.
            loss: Returns the loss. It waits for the device, so it is called only if the loss is logged.
            stall_s: Seconds that the device waited for data, as far as they have become known since the last step.
        """
        self._images += images
        self._stall_s += stall_s
        self._progress.add_seconds(wait=stall_s)
        if self._clock() - self._recorded >= LOG_INTERVAL_S:
            self.log({"loss": loss(), "learning_rate": rate})
        self._progress.update(images, self._detail)

    def log(self, values: dict[str, float]) -> None:
        """Write metrics to the files. The next log line shows them if they contain a loss."""
        now = self._clock()
        self._recorded = now
        elapsed_s = max(now - self._started, 1e-9)
        values = {
            **values,
            "images_per_s": (self._images - self._already) / elapsed_s,
            "waiting_for_data": self._stall_s / elapsed_s,
        }
        if "loss" in values:
            self._detail = (
                f"{self._recipe} · loss {values['loss']:.3f} · applied learning rate {values['learning_rate']:.3g} · "
                f"{values['waiting_for_data']:.0%} waiting for data"
            )
        line = {"images_processed": self._images, "seconds": round(elapsed_s, 3), **values}
        self._metrics.append(json.dumps(line).encode() + b"\n")
        self._events.append(tensorboard.scalars_record(self._images, values))
        if now - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write all metrics that are still in memory."""
        self._flushed = self._clock()
        self._metrics.flush()
        self._events.flush()


def _new_event_file_uri(folder: str) -> str:
    """Return the URI of a new event file that is the last one by name.

    TensorBoard reads event files in the order of their names. Only the last one can therefore make it drop the scalars
    past the checkpoint.
    """
    earlier = [int(match[1]) for entry in storage.list_objects(folder) if (match := _EVENTS.search(entry.uri))]
    # The number is a time in microseconds. If the clock was set back, it is one more than that of the last file.
    now = max(time.time_ns() // 1000, *(number + 1 for number in earlier), 0)
    return storage.join(folder, f"events.out.tfevents.{now:017}.{secrets.token_hex(4)}")


def _read_lines_until(uri: str, images: int) -> bytes:
    """Return the lines of earlier processes up to the checkpoint of so many images."""
    if not images:
        return b""
    lines = (storage.read_or_none(uri) or b"").splitlines(keepends=True)
    counted = [(line, _parse_images_processed(line)) for line in lines]
    if torn := sum(count is None for _, count in counted):
        log_info("train", f"{uri}: {torn} of {len(lines)} lines are torn, and are left out")
    return b"".join(line for line, count in counted if count is not None and count <= images)


def _parse_images_processed(line: bytes) -> int | None:
    """Return the images processed at a line, or None if the line is damaged.

    A kill may truncate a line. While a pod is replaced, two processes may write to one file for a moment.
    """
    try:
        return int(json.loads(line)["images_processed"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None
