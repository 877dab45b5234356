"""Test that listing and metadata are the same in all stores."""

import time
from pathlib import Path

from semiscale import storage
from tests.support.objects import list_names, write_objects


def test_empty_and_missing_folders_list_nothing(bucket: str) -> None:
    assert list(storage.list_objects(bucket)) == []
    assert list(storage.list_objects(storage.join(bucket, "nothing"))) == []


def test_a_missing_bucket_lists_nothing(remote: str) -> None:
    assert list(storage.list_objects(f"{remote}-other")) == []
    assert list(storage.list_objects(f"{remote}-other/a")) == []


def test_all_objects_are_listed_with_their_sizes(bucket: str) -> None:
    write_objects(bucket, "a/1", "a/b/22", "c")
    assert list_names(bucket) == ["a/1", "a/b/22", "c"]
    assert [entry.size_bytes for entry in storage.list_objects(bucket)] == [3, 6, 1]


def test_a_prefix_ends_at_a_slash(bucket: str) -> None:
    write_objects(bucket, "a/1", "ab/2", "a.tar", "a-b/3")
    assert list_names(storage.join(bucket, "a")) == ["1"]


def test_a_trailing_slash_is_ignored(bucket: str) -> None:
    write_objects(bucket, "a/1", "b")
    assert list(storage.list_objects(storage.join(bucket, "a/"))) == list(
        storage.list_objects(storage.join(bucket, "a"))
    )
    assert list(storage.list_objects(storage.join(bucket, "b/"))) == list(
        storage.list_objects(storage.join(bucket, "b"))
    )
    assert list(storage.list_objects(bucket + "/")) == list(storage.list_objects(bucket))


def test_the_uri_of_an_object_lists_the_object(bucket: str) -> None:
    write_objects(bucket, "a/1.tar", "a/1.tar.idx")
    uri = storage.join(bucket, "a/1.tar")
    assert list(storage.list_objects(uri)) == [storage.head(uri)]


def test_an_object_and_objects_below_it_are_listed(remote: str) -> None:
    write_objects(remote, "a", "a/1")
    assert [entry.uri for entry in storage.list_objects(storage.join(remote, "a"))] == [
        f"{remote}/a",
        f"{remote}/a/1",
    ]


def test_objects_are_sorted_by_their_whole_uri(bucket: str) -> None:
    # In the order of folders, `a/` would come before `a-`. In the order of code points it comes after it.
    names = ["Z", "a-b/1", "a.b", "a/1", "a0", "z/10", "z/9", "é"]
    write_objects(bucket, *reversed(names))
    assert list_names(bucket) == names


def test_names_that_start_with_a_dot_are_listed(bucket: str) -> None:
    write_objects(bucket, ".hidden", "a/.b/c")
    assert list_names(bucket) == [".hidden", "a/.b/c"]


def test_all_pages_are_listed(bucket: str) -> None:
    # A page of the S3 server holds ten objects. The GCS emulator, unlike GCS, has no limit for a page.
    names = [f"{number:02}/{number}" for number in range(31)]
    write_objects(bucket, *names)
    assert list_names(bucket) == names
    assert storage.list_dirs(bucket) == [f"{number:02}" for number in range(31)]


def test_only_direct_folders_are_listed(bucket: str) -> None:
    write_objects(bucket, "b/1", "a/2/3", "ab", "c d/#/1")
    assert storage.list_dirs(bucket) == ["a", "b", "c d"]
    assert storage.list_dirs(bucket + "/") == ["a", "b", "c d"]
    assert storage.list_dirs(storage.join(bucket, "a")) == ["2"]


def test_objects_are_not_folders(bucket: str) -> None:
    write_objects(bucket, "a")
    assert storage.list_dirs(bucket) == []
    assert storage.list_dirs(storage.join(bucket, "a")) == []
    assert storage.list_dirs(storage.join(bucket, "nothing")) == []


def test_a_missing_bucket_has_no_folders(remote: str) -> None:
    assert storage.list_dirs(f"{remote}-other") == []


def test_an_empty_folder_has_no_objects(bucket: str) -> None:
    if storage.is_object_store(bucket):
        # The function "create folder" of the consoles writes such an object.
        storage.write_bytes(f"{bucket}/empty/", b"")
    else:
        Path(bucket, "empty").mkdir()
    assert storage.list_dirs(bucket) == ["empty"]
    assert list(storage.list_objects(bucket)) == []


def test_missing_objects_and_folders_have_no_metadata(bucket: str) -> None:
    write_objects(bucket, "a/1")
    assert storage.head(storage.join(bucket, "b")) is None
    assert storage.head(storage.join(bucket, "a")) is None, "a folder is not an object"
    assert storage.head(bucket) is None


def test_a_version_changes_only_with_the_bytes(bucket: str) -> None:
    uri = storage.join(bucket, "a")
    storage.write_bytes(uri, b"one")
    first = storage.head(uri)
    assert first == storage.head(uri)
    assert [first] == list(storage.list_objects(bucket))
    # The clock of a local file system ticks every few ms.
    time.sleep(0.02)
    storage.write_bytes(uri, b"two")
    second = storage.head(uri)
    assert first
    assert second
    assert second.size_bytes == first.size_bytes
    assert second.version != first.version
