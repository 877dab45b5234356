"""Test the parsing of URIs, and the refusal of invalid ones."""

from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError


def test_uris_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute_uri("a/b/") == f"{tmp_path}/a/b"
    assert storage.absolute_uri("/a/b/") == "/a/b"
    assert storage.absolute_uri("file:///a/b") == "/a/b"
    assert storage.absolute_uri("gs://bucket/a/") == "gs://bucket/a"
    assert storage.absolute_uri("s3://bucket") == "s3://bucket"
    assert storage.absolute_uri("~/a") == str(Path.home() / "a")


def test_local_uris_become_paths() -> None:
    assert storage.uri_to_path("a/b c") == Path("a/b c")
    assert storage.uri_to_path("file:///a/b%20c") == Path("/a/b%20c"), "the path is taken as it is written"


def test_object_stores_are_known_by_their_scheme() -> None:
    assert storage.is_object_store("gs://a/b")
    assert storage.is_object_store("s3://a/b")
    assert not storage.is_object_store("file:///a/b")
    assert not storage.is_object_store("gs:/a")


def test_names_are_joined_with_a_slash() -> None:
    assert storage.join("gs://a/", "b", "c") == "gs://a/b/c"
    assert storage.join("/", "b") == "/b"


@pytest.mark.parametrize("uri", ["http://host/a", "hdfs://a/b", "GS://a/b", "://a"])
def test_an_unknown_scheme_is_refused(uri: str) -> None:
    for function in (
        storage.read_bytes,
        storage.head,
        storage.open_object,
        storage.delete,
        storage.list_dirs,
        storage.absolute_uri,
    ):
        with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
            function(uri)
    with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
        list(storage.list_objects(uri))
    with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
        storage.write_bytes(uri, b"")


def test_a_file_uri_with_a_host_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"SEMI-E023"):
        storage.read_bytes("file://data/a")


def test_a_uri_without_a_bucket_is_refused(remote: str) -> None:
    scheme = remote.partition("://")[0]
    for uri in (f"{scheme}://", f"{scheme}:///a"):
        with pytest.raises(InvalidInputError, match=r"SEMI-E020"):
            storage.head(uri)
        with pytest.raises(InvalidInputError, match=r"SEMI-E020"):
            list(storage.list_objects(uri))


@pytest.mark.usefixtures("s3_bucket")
def test_an_invalid_bucket_name_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidInputError, match=r"^s3://two words/a: [^\n]*SEMI-E026\]$"):
        storage.head("s3://two words/a")
