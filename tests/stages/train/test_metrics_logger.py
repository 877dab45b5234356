"""What a training tells as it runs: the line of log, the JSON lines, and event files that TensorBoard itself reads."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semiscale.stages.train.metrics_logger import MetricsLogger


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path) -> list[dict[str, float]]:
    """The JSON lines."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a scalar: (images processed, value). A restart hides what came at or after its step."""
    shown: list[tuple[int, float]] = []
    for path in sorted(folder.glob("events.*")):
        for event in records(path.read_bytes()):
            if event.HasField("session_log"):
                shown = [point for point in shown if point[0] < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return shown


def records(data: bytes) -> Iterator[Any]:
    """Read TFRecords by tensorboardX's checksums and protocol buffers, which are not the program's own."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    while data:
        size = int.from_bytes(data[:8], "little")
        content, rest = data[12 : 12 + size], data[16 + size :]
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(data[12 + size : 16 + size], "little") == masked_crc32c(content)
        yield Event.FromString(content)
        data = rest


def train(watch: MetricsLogger, clock: Clock, steps: int, first: int = 0) -> None:
    """Steps of 100 images, two seconds each, of which half a second is waiting."""
    for step in range(first, first + steps):
        clock.now += 2
        watch.log_step(100, 0.1, lambda step=step: 8.0 - step, 0.5)  # type: ignore[misc]
    watch.flush()


def test_a_line_every_few_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    train(MetricsLogger(str(tmp_path), "teacher", 1000, clock=clock), clock, 6)
    assert capsys.readouterr().out.splitlines() == [
        f"train · {done} · 50/s · {left} left · teacher · loss {loss} · learning rate 0.1 · 25% waiting for data"
        for done, left, loss in (
            ("300 of 1,000 images · 30%", "0:14", "6.000"),
            ("600 of 1,000 images · 60%", "0:08", "3.000"),
        )
    ]
    assert lines(tmp_path)[0] == {
        "images_processed": 300, "seconds": 6.0, "loss": 6.0, "learning_rate": 0.1,
        "images_per_s": 50.0, "waiting_for_data": 0.25,
    }  # fmt: skip
    assert events(tmp_path, "loss") == [(300, 6.0), (600, 3.0)]


def test_who_goes_on_continues_the_record_at_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process before told of 900 images, and left a checkpoint at 600."""
    clock = Clock()
    train(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 9)
    capsys.readouterr()
    watch = MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock)
    train(watch, clock, 3, first=16)
    assert "900 of 1,500 images · 60% · 50/s · 0:12 left" in capsys.readouterr().out
    assert [(line["images_processed"], line["loss"]) for line in lines(tmp_path)] == [(300, 6), (600, 3), (900, -10)]
    assert events(tmp_path, "loss") == [(300, 6), (600, 3), (900, -10)]


def test_a_clock_that_was_set_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod that goes on may run on a machine whose clock is an hour behind."""
    clock = Clock()
    train(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 9)
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    train(MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock), clock, 3, first=16)
    train(MetricsLogger(str(tmp_path), "teacher", 1500, 900, clock), clock, 3, first=19)
    assert len(list(tmp_path.glob("events.*"))) == 3
    assert events(tmp_path, "loss") == [(300, 6), (600, 3), (900, -10), (1200, -13)]


def test_lines_that_are_torn_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut off by a kill, written into by another process, or blank after a machine lost its power."""
    clock = Clock()
    train(MetricsLogger(str(tmp_path), "teacher", 1500, clock=clock), clock, 6)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:9] + first + second + b"[1]\n" + bytes(5) + b"\n" + second[:-9])
    MetricsLogger(str(tmp_path), "teacher", 1500, 600, clock).flush()
    assert [line["images_processed"] for line in lines(tmp_path)] == [300, 600]
    assert "metrics.jsonl: 4 of 6 lines are torn, and are left out" in capsys.readouterr().out


def test_a_file_on_a_disk_is_appended_to(tmp_path: Path) -> None:
    """TensorBoard keeps an event file open: one that is replaced would never change for it."""
    clock = Clock()
    watch = MetricsLogger(str(tmp_path), "teacher", 1000, clock=clock)
    train(watch, clock, 3)
    (file,) = tmp_path.glob("events.*")
    before = file.stat().st_ino, file.read_bytes()
    train(watch, clock, 3, first=3)
    assert file.stat().st_ino == before[0]
    assert file.read_bytes().startswith(before[1])
    assert len(lines(tmp_path)) == 2
