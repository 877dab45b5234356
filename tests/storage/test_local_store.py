"""Test the local store: file URIs, links, pipes and names."""

import os
import threading
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from tests.support.objects import list_names, write_objects


def test_a_file_uri_is_its_path(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a#b", b"x")
    assert (tmp_path / "a#b").read_bytes() == b"x"
    assert storage.read_bytes(f"file://{tmp_path}/a#b") == b"x"
    assert [entry.uri for entry in storage.list_objects(f"file://{tmp_path}")] == [str(tmp_path / "a#b")]


def test_links_are_followed(tmp_path: Path) -> None:
    write_objects(str(tmp_path), "real/a")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "file").symlink_to(tmp_path / "real" / "a")
    assert list_names(str(tmp_path / "set")) == ["file", "folder/a"]
    assert storage.list_dirs(str(tmp_path / "set")) == ["folder"]


def test_a_link_to_nothing_is_listed_and_missing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nothing")
    assert list_names(str(tmp_path)) == ["a"]
    assert storage.read_or_none(str(tmp_path / "a")) is None


def test_a_pipe_is_not_listed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list_names(str(tmp_path)) == []


def test_files_can_be_deleted_during_a_listing(tmp_path: Path) -> None:
    # Another process of the same training deletes old checkpoints in this way.
    paths = [tmp_path / f"{number:02}.json" for number in range(20)]
    stop = threading.Event()

    def write_and_delete() -> None:
        while not stop.is_set():
            for path in paths:
                path.touch()
            for path in paths:
                path.unlink()

    thread = threading.Thread(target=write_and_delete)
    thread.start()
    try:
        for _ in range(500):
            assert {entry.uri for entry in storage.list_objects(str(tmp_path))} <= set(map(str, paths))
    finally:
        stop.set()
        thread.join()


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")).write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"SEMI-E024"):
        list(storage.list_objects(str(tmp_path)))
