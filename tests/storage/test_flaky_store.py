"""Test that a flaky store changes no bytes.

The store answers 503, resets connections and ends downloads too early.
"""

from pathlib import Path

import pytest

from semiscale import storage
from tests.support import sample_images
from tests.support.proxies import serve_flaky
from tests.support.stages import Stages

# The vendors' clients do not close a connection that was reset. The garbage collector warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ADDRESS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}


@pytest.fixture
def scheme(remote: str) -> str:
    """Return the scheme of the store of `remote`."""
    return remote.partition("://")[0]


def test_every_call_gets_through(
    remote: str, scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue(f"{scheme}_server")
    content = bytes(range(256)) * 32
    with serve_flaky(server, seed=1) as proxy:
        monkeypatch.setenv(ADDRESS[scheme], proxy.address)
        storage._open_store.cache_clear()
        for number in range(15):
            uri = f"{remote}/object-{number}"
            assert storage.write_bytes(uri, content)
            assert storage.read_bytes(uri) == content
            assert storage.read_bytes(uri, 1000, 5000) == content[1000:6000]
            entry = storage.head(uri)
            assert entry is not None
            assert entry.size_bytes == len(content)
        assert len(list(storage.list_objects(remote))) == 15
        storage.delete(f"{remote}/object-0")
        assert proxy.faults["cut"] > 3
        assert sum(proxy.faults.values()) > 4
    storage._open_store.cache_clear()


def test_scan_merge_and_pack_leave_the_same_bytes(
    tmp_path: Path, remote: str, scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Stages(tmp_path, unlabeled=[f"{remote}/pool"])
    for path in sample_images.write_pool(tmp_path / "pool", 4, 50).iterdir():
        storage.upload(path, f"{remote}/pool/{path.name}")
    expected = [
        storage.read_bytes(uri) for uri in (good.selection.selection, f"{good.packed.folder}/packed-000000.tar")
    ]
    with serve_flaky(request.getfixturevalue(f"{scheme}_server"), seed=2) as proxy:
        monkeypatch.setenv(ADDRESS[scheme], proxy.address)
        storage._open_store.cache_clear()
        config = good.config.model_copy(update={"workdir": f"{remote}/work"})
        bad = Stages.on(config, tmp_path / "bad")
        bad.__dict__["teacher"] = good.teacher
        actual = [
            storage.read_bytes(uri) for uri in (bad.selection.selection, f"{bad.packed.folder}/packed-000000.tar")
        ]
        assert sum(proxy.faults.values()) > 2
    storage._open_store.cache_clear()
    assert actual == expected
