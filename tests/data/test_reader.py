"""Test the reader of shards: repeated reads and changed shards."""

from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import listing, reader
from semiscale.data.shard import SampleFields, Shard
from tests.support.shard_files import make_image, make_parquet, make_tar, read_samples


def test_a_second_read_returns_the_same_samples(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "a.tar"), make_tar([(f"{n}.jpg", make_image(n)) for n in range(4)]))
    storage.write_bytes(storage.join(bucket, "a.parquet"), make_parquet({"image": [make_image(n) for n in range(4)]}))
    storage.write_bytes(storage.join(bucket, "0.jpg"), make_image(0))
    assert read_samples(bucket) == read_samples(bucket)


def test_a_shard_survives_json(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(make_image(0))
    (shard,) = listing.list_shards([str(tmp_path)])
    assert Shard.model_validate_json(shard.model_dump_json()) == shard


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_shard_that_is_gone_is_refused(bucket: str, name: str) -> None:
    storage.write_bytes(storage.join(bucket, name), b"x")
    (shard,) = listing.list_shards([bucket])
    storage.delete(shard.uri)
    with pytest.raises(FileNotFoundError):
        list(reader.iter_samples(shard, SampleFields()))


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_shard_that_changed_is_refused(bucket: str, name: str) -> None:
    storage.write_bytes(storage.join(bucket, name), b"x")
    (shard,) = listing.list_shards([bucket])
    storage.write_bytes(shard.uri, b"other")
    with pytest.raises(SemiscaleError, match=f"^{shard.uri}: .*SEMI-E021"):
        list(reader.iter_samples(shard, SampleFields()))


def test_an_unfinished_read_closes_the_file(tmp_path: Path) -> None:
    # Warnings are errors in the tests. A file that stays open would cause a warning.
    (tmp_path / "a.tar").write_bytes(make_tar([(f"{n}.jpg", make_image(n)) for n in range(4)]))
    (shard,) = listing.list_shards([str(tmp_path)])
    samples = reader.iter_samples(shard, SampleFields())
    assert next(samples).index == 0
    del samples
