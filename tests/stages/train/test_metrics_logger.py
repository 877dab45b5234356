"""Test the log lines, JSON lines and TensorBoard event files of a training."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semiscale.stages.train.metrics_logger import MetricsLogger


class Clock:
    """A clock that a test sets, in seconds."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def read_lines(folder: Path) -> list[dict[str, float]]:
    """Read the JSON lines."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Read the points of a scalar that TensorBoard shows: (images processed, value).

    The start of a session hides earlier points at or after its step.
    """
    shown: list[tuple[int, float]] = []
    for path in sorted(folder.glob("events.*")):
        for event in parse_records(path.read_bytes()):
            if event.HasField("session_log"):
                shown = [point for point in shown if point[0] < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return shown


def parse_records(data: bytes) -> Iterator[Any]:
    """Parse TFRecords with the checksums and protocol buffers of tensorboardX."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    while data:
        size = int.from_bytes(data[:8], "little")
        content, rest = data[12 : 12 + size], data[16 + size :]
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(data[12 + size : 16 + size], "little") == masked_crc32c(content)
        yield Event.FromString(content)
        data = rest


def log_steps(metrics: MetricsLogger, clock: Clock, steps: int, first: int = 0) -> None:
    """Log steps of 100 images and two seconds, of which half a second is a data stall."""
    for step in range(first, first + steps):
        clock.now += 2
        metrics.log_step(100, 0.1, lambda step=step: 8.0 - step, 0.5)  # type: ignore[misc]
    metrics.flush()


def test_a_line_is_logged_every_few_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1000, clock=clock), clock, 6)
    assert capsys.readouterr().out.splitlines() == [
        f"train · {done} · 50/s · {left} left · teacher · loss {loss} · applied learning rate 0.1 · "
        "25% waiting for data"
        for done, left, loss in (
            ("300 of 1,000 images · 30%", "0:14", "6.000"),
            ("600 of 1,000 images · 60%", "0:08", "3.000"),
        )
    ]
    assert read_lines(tmp_path)[0] == {
        "images_processed": 300, "seconds": 6.0, "loss": 6.0, "learning_rate": 0.1,
        "images_per_s": 50.0, "waiting_for_data": 0.25,
    }  # fmt: skip
    assert read_events(tmp_path, "loss") == [(300, 6.0), (600, 3.0)]


def test_a_resumed_process_continues_the_metrics_at_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume from a checkpoint at 600 images. The earlier process has logged 900."""
    clock = Clock()
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 9)
    capsys.readouterr()
    metrics = MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock)
    log_steps(metrics, clock, 3, first=16)
    assert "900 of 1,500 images · 60% · 50/s · 0:12 left" in capsys.readouterr().out
    assert [(line["images_processed"], line["loss"]) for line in read_lines(tmp_path)] == [
        (300, 6),
        (600, 3),
        (900, -10),
    ]
    assert read_events(tmp_path, "loss") == [(300, 6), (600, 3), (900, -10)]


def test_a_clock_that_is_slow_hides_no_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume on a machine whose clock is an hour slow."""
    clock = Clock()
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 9)
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock), clock, 3, first=16)
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1500, 900, clock), clock, 3, first=19)
    assert len(list(tmp_path.glob("events.*"))) == 3
    assert read_events(tmp_path, "loss") == [(300, 6), (600, 3), (900, -10), (1200, -13)]


def test_damaged_lines_are_dropped_and_counted_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage lines as a kill, a second process and a loss of power do."""
    clock = Clock()
    log_steps(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 6)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:9] + first + second + b"[1]\n" + bytes(5) + b"\n" + second[:-9])
    MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock).flush()
    assert [line["images_processed"] for line in read_lines(tmp_path)] == [300, 600]
    assert "metrics.jsonl: 4 of 6 lines are torn, and are left out" in capsys.readouterr().out


def test_a_file_on_a_disk_is_appended_to(tmp_path: Path) -> None:
    # TensorBoard keeps an event file open, so it would not notice a file that replaces it.
    clock = Clock()
    metrics = MetricsLogger(str(tmp_path), "teacher", 1000, clock=clock)
    log_steps(metrics, clock, 3)
    (file,) = tmp_path.glob("events.*")
    before = file.stat().st_ino, file.read_bytes()
    log_steps(metrics, clock, 3, first=3)
    assert file.stat().st_ino == before[0]
    assert file.read_bytes().startswith(before[1])
    assert len(read_lines(tmp_path)) == 2
