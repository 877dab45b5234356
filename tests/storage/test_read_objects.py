"""Test that reading is the same in all stores."""

import io
import random

import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.storage import base
from tests.support.objects import write_objects


def test_whole_objects_and_ranges_are_read(bucket: str) -> None:
    uri = storage.join(bucket, "digits")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 0, 1) == b"0"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 7) == b"789"


def test_a_range_ends_at_the_end_of_the_object(bucket: str) -> None:
    uri = storage.join(bucket, "digits")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri, 8, 100) == b"89"
    assert storage.read_bytes(uri, 10) == b""
    assert storage.read_bytes(uri, 10, 1) == b""
    assert storage.read_bytes(uri, 99, 5) == b""


def test_empty_objects_and_ranges_have_no_bytes(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "full"), b"0123456789")
    storage.write_bytes(storage.join(bucket, "empty"), b"")
    assert storage.read_bytes(storage.join(bucket, "full"), 3, 0) == b""
    assert storage.read_bytes(storage.join(bucket, "empty")) == b""
    assert storage.read_bytes(storage.join(bucket, "empty"), 0, 4) == b""
    assert storage.read_or_none(storage.join(bucket, "empty")) == b""


@pytest.mark.parametrize("size", [None, 0, 1])
def test_a_missing_object_raises_an_error(bucket: str, size: int | None) -> None:
    write_objects(bucket, "a/1")
    for name in ("b", "a", "a/1/2"):
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(storage.join(bucket, name), 0, size)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(bucket)


def test_read_or_none_returns_none_for_a_missing_object(bucket: str) -> None:
    assert storage.read_or_none(storage.join(bucket, "nothing")) is None


def test_a_missing_bucket_has_no_objects(remote: str) -> None:
    assert storage.head(f"{remote}-other/a") is None
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{remote}-other/a")
    with pytest.raises(FileNotFoundError):
        storage.write_bytes(f"{remote}-other/a", b"")


def test_an_open_object_is_read_in_order(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small chunk makes small objects take several requests.
    monkeypatch.setattr(base, "READ_CHUNK_BYTES", 1000)
    data = random.Random(0).randbytes(10_007)
    storage.write_bytes(storage.join(bucket, "a"), data)
    with storage.open_object(storage.join(bucket, "a")) as file:
        parts = list(iter(lambda: file.read(333), b""))
    assert b"".join(parts) == data
    assert {len(part) for part in parts[:-1]} == {333}


def test_an_open_object_can_seek(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "READ_CHUNK_BYTES", 1000)
    data = random.Random(1).randbytes(5000)
    storage.write_bytes(storage.join(bucket, "a"), data)
    with storage.open_object(storage.join(bucket, "a")) as file:
        assert file.seekable()
        assert file.seek(-8, io.SEEK_END) == 4992
        assert file.read() == data[-8:]
        assert file.seek(10) == 10
        assert file.read(5) == data[10:15]
        assert file.seek(2000, io.SEEK_CUR) == 2015
        assert file.tell() == 2015
        assert file.read(2500) == data[2015:4515]
        assert file.seek(6000) == 6000
        assert file.read(1) == b""
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)
        file.seek(0)
        assert file.read() == data


def test_an_open_empty_object_has_no_bytes(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "a"), b"")
    with storage.open_object(storage.join(bucket, "a")) as file:
        assert file.read() == b""


def test_a_missing_object_cannot_be_opened(bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.open_object(storage.join(bucket, "a"))


def test_an_object_that_changes_while_it_is_read_is_refused(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "READ_CHUNK_BYTES", 1000)
    uri = storage.join(remote, "a")
    storage.write_bytes(uri, b"old" * 5000)
    with storage.open_object(uri) as file:
        assert file.read(3) == b"old"
        storage.write_bytes(uri, b"new" * 5000)
        with pytest.raises(SemiscaleError, match=f"^{uri}: .*SEMI-E021"):
            file.read(9000)


def test_a_store_that_does_not_answer_is_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # This runs in S3 only, because google-cloud-storage retries for two minutes.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage._open_store.cache_clear()
    for function in (storage.read_bytes, storage.head, storage.list_dirs, storage.delete):
        with pytest.raises(SemiscaleError, match=f"^{s3_bucket}/a.*: .*127.0.0.1:9.*SEMI-E025"):
            function(f"{s3_bucket}/a")
