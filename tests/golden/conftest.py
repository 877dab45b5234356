"""Provide the bucket of the golden workdir, with and without the workdir."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden import program
from tests.golden.bucket import Bucket, unpack_objects


@pytest.fixture
def golden_bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Return the empty bucket of the golden workdir on an S3 server of the tests.

    The environment has the address of the server.
    """
    program.make_small_shard_groups(monkeypatch)
    bucket = Bucket()
    bucket.empty()
    yield bucket
    bucket.empty()
    bucket.close()


@pytest.fixture(scope="session")
def archived() -> dict[str, bytes]:
    """Return the objects of the archive by their keys."""
    return unpack_objects()


@pytest.fixture
def old_workdir(golden_bucket: Bucket, archived: dict[str, bytes]) -> Bucket:
    """Return the bucket with the finished workdir of version 0.1.0 and its data."""
    golden_bucket.fill(archived)
    return golden_bucket


@pytest.fixture
def handed_on(tmp_path: Path) -> Path:
    """Return a folder for receipts on their way from stage to stage."""
    return tmp_path / "receipts"
