"""Give the tests object stores, and small shard groups."""

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

# Two test processes share two cores. The threads of torch spin if there are more of them than cores. torch reads this
# at its first use.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests read the lines that a person at a terminal sees.
os.environ["SEMISCALE_LOG"] = "plain"
# kfp traces the graph at this import. It inspects the whole stack and all loaded modules at each setting of a task's
# hardware. With pytest's stack that took six seconds of every test process, so a fresh thread imports the module.
if "PYTEST_XDIST_WORKER" in os.environ:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, "pipeline").result()


@pytest.fixture(autouse=True)
def _use_small_shard_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several shard groups of a few dozen images."""
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", 50)


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """Return the address of a Google Cloud Storage emulator that is started once."""
    with serve_store("gs") as address:
        yield address


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the address of an S3 server that is started once."""
    with serve_store("s3") as address:
        yield address


@pytest.fixture(params=["file", "gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    """Return the URI of an empty bucket or folder in each kind of store."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    """Return the URI of an empty bucket in each kind of object store."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


@pytest.fixture
def file_bucket(tmp_path: Path) -> str:
    """Return the path of an empty folder."""
    return str(tmp_path)


@pytest.fixture
def gs_bucket(gs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URI of an empty bucket of the GCS emulator.

    The environment has its address, and child processes inherit it.
    """
    set_store_environment(monkeypatch, {"STORAGE_EMULATOR_HOST": gs_server, "NO_PROXY": "127.0.0.1"})
    name = f"bucket-{uuid.uuid4().hex}"
    # This import and boto3's below take a second, and few tests need them.
    from google.cloud import storage as gcs

    with gcs.Client() as client:
        client.create_bucket(name)
    yield f"gs://{name}"
    storage._open_store.cache_clear()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Return the URI of an empty bucket of the S3 server.

    The environment has its address, and child processes inherit it.
    """
    missing = str(tmp_path / "none")
    set_store_environment(
        monkeypatch,
        {
            "AWS_ENDPOINT_URL": s3_server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": missing,
            "AWS_SHARED_CREDENTIALS_FILE": missing,
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


def set_store_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set the environment, and forget the stores that were opened before."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage._open_store.cache_clear()
