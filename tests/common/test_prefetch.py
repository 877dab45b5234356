"""Test that prefetching keeps bytes and order, is bounded, and hides latency."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.common.prefetch import map_prefetched, prefetch
from semiscale.data.listing import list_shards
from semiscale.data.loose_file_reader import PREFETCH_FILES
from semiscale.data.reader import iter_samples
from semiscale.data.shard import SampleFields
from semiscale.storage import base
from tests.support import sample_images
from tests.support.threads import wait_for_prefetch_threads


def test_results_are_in_order_and_the_calls_in_flight_are_bounded() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    results = map_prefetched(work, count(), 4)
    for expected in range(30):
        assert next(results) == expected
        assert len(started) <= expected + 4
    results.close()
    wait_for_prefetch_threads()


def test_an_error_is_raised_at_its_position() -> None:
    def work(number: int) -> int:
        if number == 5:
            raise ValueError(number)
        return number

    results: Iterator[int] = map_prefetched(work, range(10), 3)
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5"):
        next(results)
    wait_for_prefetch_threads()
    assert list(map_prefetched(work, range(0), 3)) == []


def numbers(count: int, made: list[int]) -> Generator[int]:
    """Yield numbers and record each of them.

    Five numbers end in a ValueError.

    Args:
        count: The numbers to yield.
        made: Receives each number, and -1 when the generator is closed.
    """
    try:
        for number in range(count):
            made.append(number)
            yield number
        if count == 5:
            raise ValueError(count)
    finally:
        made.append(-1)


def test_the_next_item_is_made_while_another_is_used() -> None:
    made: list[int] = []
    items = prefetch(numbers(30, made), 2)
    for expected in range(10):
        assert next(items) == expected
        deadline = time.monotonic() + 60
        while len(made) < expected + 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(made) == expected + 3, "one item is ready and one is being made"
    items.close()
    wait_for_prefetch_threads()
    assert made[-1] == -1, "the generator must be closed"
    assert len(made) < 15


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_prefetched_generator_ends_and_fails_as_without_prefetching(count: int) -> None:
    made: list[int] = []
    items, results = prefetch(numbers(count, made)), list[int]()
    with pytest.raises(ValueError, match="5") if count == 5 else nullcontext():
        results.extend(items)
    assert made == [*range(count), -1]
    assert results == list(range(count))
    wait_for_prefetch_threads()


def test_a_prefetched_tar_has_the_same_samples(remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A small tar takes several requests.
    monkeypatch.setattr(base, "READ_CHUNK_BYTES", 3000)
    members = {f"{number:02}.png": sample_images.draw_png(0, number, size=8 + number) for number in range(30)}
    # The reader seeks past this member.
    members["17.txt"] = b"x" * 20_000
    path = sample_images.write_tar(tmp_path / "a.tar", members)
    storage.upload(path, f"{remote}/a.tar")
    (local,), (remote_shard,) = list_shards([str(path)]), list_shards([remote])
    images = [sample.image for sample in iter_samples(local, SampleFields())]
    assert [sample.image for sample in iter_samples(remote_shard, SampleFields(), prefetch=True)] == images
    with storage.open_object(f"{remote}/a.tar", prefetch=True) as file:
        parts = list(iter(lambda: file.read(777), b""))
        file.seek(100)
        assert file.read(5000) == path.read_bytes()[100:5100]
    assert b"".join(parts) == path.read_bytes()


@pytest.mark.parametrize("kind", ["loose", "linked"])
def test_loose_and_linked_files_are_read_concurrently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    names = [f"{number:02}.png" for number in range(2 * PREFETCH_FILES)]
    (tmp_path / "files").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "files" / name).write_bytes(sample_images.draw_png(0, number))
    pq.write_table(pa.table({"image": [f"files/{name}" for name in names]}), tmp_path / "links.parquet")
    (shard,) = list_shards([str(tmp_path / ("files" if kind == "loose" else "links.parquet"))])
    expected = list(iter_samples(shard, SampleFields(label="")))
    barrier, read_bytes = threading.Barrier(PREFETCH_FILES, timeout=30), storage.read_bytes

    def read_with_others(uri: str, *args: Any, **options: Any) -> bytes:
        # The barrier times out and raises an error if fewer files are read at the same time.
        barrier.wait()
        return read_bytes(uri, *args, **options)

    monkeypatch.setattr(storage, "read_bytes", read_with_others)
    assert list(iter_samples(shard, SampleFields(label=""), prefetch=True)) == expected
    assert len(expected) == len(names)
