"""Fixtures that many tests share: object stores to work in."""

import importlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.stages.plan import shard_groups
from tests.support.servers import serve_store

# Two test processes share two cores; torch's threads spin when there are more of them than cores. Read at first use.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SEMISCALE_LOG"] = "plain"  # lines as a person at a terminal sees them
# kfp traces the graph at this import, and looks at the whole stack and all loaded modules as often as it is told of a
# task's hardware. Where most modules are loaded and the stack is pytest's, that took six seconds of every test process.
if "PYTEST_XDIST_WORKER" in os.environ:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, "pipeline").result()


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few dozen images are several units, as a few million would be."""
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", 50)


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """The address of a Google Cloud Storage emulator, started once."""
    with serve_store("gs") as address:
        yield address


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server, started once."""
    with serve_store("s3") as address:
        yield address


@pytest.fixture(params=["file", "gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    """The URI of a fresh, empty place in each kind of store."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    """The URI of a fresh, empty bucket in each kind of object store."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


@pytest.fixture
def file_bucket(tmp_path: Path) -> str:
    """An empty folder."""
    return str(tmp_path)


@pytest.fixture
def gs_bucket(gs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of the GCS emulator; the environment, which child processes inherit, leads there."""
    use(monkeypatch, {"STORAGE_EMULATOR_HOST": gs_server, "NO_PROXY": "127.0.0.1"})
    name = f"bucket-{uuid.uuid4().hex}"
    from google.cloud import storage as gcs  # here and below: a second of imports that few tests need

    with gcs.Client() as client:
        client.create_bucket(name)
    yield f"gs://{name}"
    storage._open_store.cache_clear()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty bucket of the S3 server; the environment, which child processes inherit, leads there."""
    nowhere = str(tmp_path / "none")
    use(
        monkeypatch,
        {
            "AWS_ENDPOINT_URL": s3_server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": nowhere,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            "NO_PROXY": "127.0.0.1",
        },
    )
    name = f"bucket-{uuid.uuid4().hex}"
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    yield f"s3://{name}"
    storage._open_store.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set the environment, and forget the stores that were opened in another."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage._open_store.cache_clear()
