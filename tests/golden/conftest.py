"""The bucket of the golden workdir, empty or with the workdir in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden import program
from tests.golden.bucket import Bucket, unpack_objects


@pytest.fixture
def golden_bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The bucket of the golden workdir, empty, on the tests' S3 server. The environment leads to that server."""
    program.make_small_shard_groups(monkeypatch)
    bucket = Bucket()
    bucket.empty()
    yield bucket
    bucket.empty()
    bucket.close()


@pytest.fixture(scope="session")
def archived() -> dict[str, bytes]:
    """The objects of the archive, by their keys."""
    return unpack_objects()


@pytest.fixture
def old_workdir(golden_bucket: Bucket, archived: dict[str, bytes]) -> Bucket:
    """The bucket with the finished workdir of version 0.1.0 and its data."""
    golden_bucket.fill(archived)
    return golden_bucket


@pytest.fixture
def handed_on(tmp_path: Path) -> Path:
    """A folder for receipts on their way from stage to stage."""
    return tmp_path / "receipts"
