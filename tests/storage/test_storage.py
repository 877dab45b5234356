"""Test the contract of storage.

It is the same on the local disk, in Google Cloud Storage and in S3.
"""

import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.storage import base

NAMES = [
    "plain",
    "two words",
    "ünïcödé-日本",
    "#hash",
    "what?",
    "100%",
    "100%25",
    "a+b&c=d",
    "semi;colon",
    "tilde~",
    "'\"",
]


def names_below(uri: str) -> list[str]:
    """List the objects below a URI, relative to it."""
    return [entry.uri.removeprefix(uri + "/") for entry in storage.list_objects(uri)]


def write_all(bucket: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(bucket, name), name.encode())


@contextmanager
def writing_in_turn(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that writes two contents to a URI in turn, until it is killed.

    The block begins after the first write.
    """
    program = (
        "import sys\n"
        "from semiscale import storage\n"
        "for number in range(10**9):\n"
        "    storage.write_bytes(sys.argv[1], bytes([number % 2]) * 3_000_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, uri]) as writer:
        while storage.head(uri) is None:
            assert writer.poll() is None
            time.sleep(0.02)
        yield writer


class TestEntries:
    def test_an_empty_place_and_a_missing_folder_list_nothing(self, bucket: str) -> None:
        assert list(storage.list_objects(bucket)) == []
        assert list(storage.list_objects(storage.join(bucket, "nothing"))) == []

    def test_a_missing_bucket_lists_nothing(self, remote: str) -> None:
        assert list(storage.list_objects(f"{remote}-other")) == []
        assert list(storage.list_objects(f"{remote}-other/a")) == []

    def test_everything_below_with_its_size(self, bucket: str) -> None:
        write_all(bucket, "a/1", "a/b/22", "c")
        assert names_below(bucket) == ["a/1", "a/b/22", "c"]
        assert [entry.size_bytes for entry in storage.list_objects(bucket)] == [3, 6, 1]

    def test_a_prefix_ends_at_a_slash(self, bucket: str) -> None:
        write_all(bucket, "a/1", "ab/2", "a.tar", "a-b/3")
        assert names_below(storage.join(bucket, "a")) == ["1"]

    def test_a_trailing_slash_means_the_same(self, bucket: str) -> None:
        write_all(bucket, "a/1", "b")
        assert list(storage.list_objects(storage.join(bucket, "a/"))) == list(
            storage.list_objects(storage.join(bucket, "a"))
        )
        assert list(storage.list_objects(storage.join(bucket, "b/"))) == list(
            storage.list_objects(storage.join(bucket, "b"))
        )
        assert list(storage.list_objects(bucket + "/")) == list(storage.list_objects(bucket))

    def test_the_object_itself(self, bucket: str) -> None:
        write_all(bucket, "a/1.tar", "a/1.tar.idx")
        uri = storage.join(bucket, "a/1.tar")
        assert list(storage.list_objects(uri)) == [storage.head(uri)]

    def test_an_object_and_what_is_below_it(self, remote: str) -> None:
        write_all(remote, "a", "a/1")
        assert [entry.uri for entry in storage.list_objects(storage.join(remote, "a"))] == [
            f"{remote}/a",
            f"{remote}/a/1",
        ]

    def test_the_order_is_of_the_whole_uri(self, bucket: str) -> None:
        # In the order of folders, `a/` would come before `a-`. In the order of code points it comes after it.
        names = ["Z", "a-b/1", "a.b", "a/1", "a0", "z/10", "z/9", "é"]
        write_all(bucket, *reversed(names))
        assert names_below(bucket) == names

    def test_names_that_start_with_a_dot_are_listed(self, bucket: str) -> None:
        write_all(bucket, ".hidden", "a/.b/c")
        assert names_below(bucket) == [".hidden", "a/.b/c"]

    def test_more_than_a_page(self, bucket: str) -> None:
        # A page of the S3 server holds ten objects. The GCS emulator, unlike GCS, has no limit for a page.
        names = [f"{number:02}/{number}" for number in range(31)]
        write_all(bucket, *names)
        assert names_below(bucket) == names
        assert storage.list_dirs(bucket) == [f"{number:02}" for number in range(31)]


class TestFolders:
    def test_only_what_is_directly_below(self, bucket: str) -> None:
        write_all(bucket, "b/1", "a/2/3", "ab", "c d/#/1")
        assert storage.list_dirs(bucket) == ["a", "b", "c d"]
        assert storage.list_dirs(bucket + "/") == ["a", "b", "c d"]
        assert storage.list_dirs(storage.join(bucket, "a")) == ["2"]

    def test_no_folder(self, bucket: str) -> None:
        write_all(bucket, "a")
        assert storage.list_dirs(bucket) == []
        assert storage.list_dirs(storage.join(bucket, "a")) == []
        assert storage.list_dirs(storage.join(bucket, "nothing")) == []

    def test_a_missing_bucket(self, remote: str) -> None:
        assert storage.list_dirs(f"{remote}-other") == []

    def test_an_empty_folder_is_a_folder_without_entries(self, bucket: str) -> None:
        if storage.is_object_store(bucket):
            # The function "create folder" of the consoles writes such an object.
            storage.write_bytes(f"{bucket}/empty/", b"")
        else:
            Path(bucket, "empty").mkdir()
        assert storage.list_dirs(bucket) == ["empty"]
        assert list(storage.list_objects(bucket)) == []


class TestStat:
    def test_nothing_there(self, bucket: str) -> None:
        write_all(bucket, "a/1")
        assert storage.head(storage.join(bucket, "b")) is None
        assert storage.head(storage.join(bucket, "a")) is None, "a folder is not an object"
        assert storage.head(bucket) is None

    def test_the_version_changes_with_the_bytes_and_only_then(self, bucket: str) -> None:
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


class TestRead:
    def test_whole_and_parts(self, bucket: str) -> None:
        uri = storage.join(bucket, "digits")
        storage.write_bytes(uri, b"0123456789")
        assert storage.read_bytes(uri) == b"0123456789"
        assert storage.read_bytes(uri, 0, 1) == b"0"
        assert storage.read_bytes(uri, 3, 4) == b"3456"
        assert storage.read_bytes(uri, 7) == b"789"

    def test_at_the_end_and_past_it(self, bucket: str) -> None:
        uri = storage.join(bucket, "digits")
        storage.write_bytes(uri, b"0123456789")
        assert storage.read_bytes(uri, 8, 100) == b"89"
        assert storage.read_bytes(uri, 10) == b""
        assert storage.read_bytes(uri, 10, 1) == b""
        assert storage.read_bytes(uri, 99, 5) == b""

    def test_no_bytes(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "full"), b"0123456789")
        storage.write_bytes(storage.join(bucket, "empty"), b"")
        assert storage.read_bytes(storage.join(bucket, "full"), 3, 0) == b""
        assert storage.read_bytes(storage.join(bucket, "empty")) == b""
        assert storage.read_bytes(storage.join(bucket, "empty"), 0, 4) == b""
        assert storage.read_or_none(storage.join(bucket, "empty")) == b""

    @pytest.mark.parametrize("size", [None, 0, 1])
    def test_missing(self, bucket: str, size: int | None) -> None:
        write_all(bucket, "a/1")
        for name in ("b", "a", "a/1/2"):
            with pytest.raises(FileNotFoundError):
                storage.read_bytes(storage.join(bucket, name), 0, size)
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(bucket)

    def test_missing_or_none(self, bucket: str) -> None:
        assert storage.read_or_none(storage.join(bucket, "nothing")) is None

    def test_a_missing_bucket(self, remote: str) -> None:
        assert storage.head(f"{remote}-other/a") is None
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{remote}-other/a")
        with pytest.raises(FileNotFoundError):
            storage.write_bytes(f"{remote}-other/a", b"")


class TestOpenRead:
    def test_in_order(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # Small data take several requests.
        monkeypatch.setattr(base, "READ_CHUNK_BYTES", 1000)
        data = random.Random(0).randbytes(10_007)
        storage.write_bytes(storage.join(bucket, "a"), data)
        with storage.open_object(storage.join(bucket, "a")) as file:
            parts = list(iter(lambda: file.read(333), b""))
        assert b"".join(parts) == data
        assert {len(part) for part in parts[:-1]} == {333}

    def test_seek_and_tail(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_an_empty_object(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "a"), b"")
        with storage.open_object(storage.join(bucket, "a")) as file:
            assert file.read() == b""

    def test_missing(self, bucket: str) -> None:
        with pytest.raises(FileNotFoundError):
            storage.open_object(storage.join(bucket, "a"))

    def test_one_version_is_read(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "READ_CHUNK_BYTES", 1000)
        uri = storage.join(remote, "a")
        storage.write_bytes(uri, b"old" * 5000)
        with storage.open_object(uri) as file:
            assert file.read(3) == b"old"
            storage.write_bytes(uri, b"new" * 5000)
            with pytest.raises(SemiscaleError, match=f"^{uri}: .*SEMI-E021"):
                file.read(9000)


class TestWrite:
    def test_replaces_and_makes_folders(self, bucket: str) -> None:
        uri = storage.join(bucket, "a/b/c")
        assert storage.write_bytes(uri, b"first, longer")
        assert storage.write_bytes(uri, b"second")
        assert storage.read_bytes(uri) == b"second"

    def test_if_absent_leaves_what_is_there(self, bucket: str) -> None:
        uri = storage.join(bucket, "a/b")
        assert storage.write_bytes(uri, b"first", if_absent=True)
        assert not storage.write_bytes(uri, b"second", if_absent=True)
        assert storage.read_bytes(uri) == b"first"
        assert names_below(bucket) == ["a/b"]

    def test_if_absent_above_the_size_of_a_single_request(self, bucket: str) -> None:
        uri = storage.join(bucket, "a")
        # google-cloud-storage uses another protocol above 8 MiB.
        data = random.Random(2).randbytes(9 << 20)
        assert storage.write_bytes(uri, data, if_absent=True)
        assert not storage.write_bytes(uri, b"second" + data, if_absent=True)
        assert storage.read_bytes(uri) == data

    def test_exactly_one_of_two_processes_wins(self, bucket: str) -> None:
        # For GCS this only tests that the request has the precondition. See servers.gcs_server.
        rounds = 20
        program = (
            "import sys\n"
            "from semiscale import storage\n"
            "bucket, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
            "storage.head(bucket + '/warm')\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "for number in range(rounds):\n"
            "    print(storage.write_bytes(f'{bucket}/{number}', me.encode(), if_absent=True), flush=True)\n"
        )
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", program, bucket, name, str(rounds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("left", "right")
        ]
        for racer in racers:
            assert racer.stdout
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        left, right = [racer.communicate(timeout=300)[0].split() for racer in racers]
        for number in range(rounds):
            assert {left[number], right[number]} == {"True", "False"}
            assert storage.read_bytes(f"{bucket}/{number}") == (b"left" if left[number] == "True" else b"right")

    def test_replace_leaves_what_another_wrote(self, bucket: str) -> None:
        uri = storage.join(bucket, "a/b")
        assert not storage.compare_and_swap(uri, b"first", b"second")
        assert storage.compare_and_swap(uri, None, b"first")
        assert not storage.compare_and_swap(uri, None, b"second")
        assert storage.compare_and_swap(uri, b"first", b"second")
        assert not storage.compare_and_swap(uri, b"first", b"third")
        assert storage.read_bytes(uri) == b"second"
        assert names_below(bucket) == ["a/b"]

    def test_of_two_processes_that_count_none_loses_a_step(self, bucket: str) -> None:
        steps = 10
        program = (
            "import sys\n"
            "from semiscale import storage\n"
            "uri, steps = sys.argv[1], int(sys.argv[2])\n"
            "while steps:\n"
            "    old = storage.read_or_none(uri)\n"
            "    steps -= storage.compare_and_swap(uri, old, b'%06d' % (int(old or 0) + 1))\n"
        )
        command = [sys.executable, "-c", program, f"{bucket}/count", str(steps)]
        racers = [subprocess.Popen(command) for _ in range(2)]
        assert [racer.wait(timeout=300) for racer in racers] == [0, 0]
        assert int(storage.read_bytes(f"{bucket}/count")) == 2 * steps

    def test_a_reader_sees_all_or_nothing(self, bucket: str) -> None:
        uri = storage.join(bucket, "a")
        with writing_in_turn(uri) as writer:
            seen = [storage.read_bytes(uri) for _ in range(10)]
            writer.kill()
        assert {(len(data), data.count(data[0])) for data in seen} == {(3_000_000, 3_000_000)}

    def test_a_killed_writer_leaves_the_object_whole(self, tmp_path: Path) -> None:
        # This runs on the disk only. The test servers of the other stores accept half a request as a whole one.
        uri = storage.join(str(tmp_path), "a")
        for _ in range(3):
            with writing_in_turn(uri) as writer:
                writer.kill()
            data = storage.read_bytes(uri)
            assert (len(data), data.count(data[0])) == (3_000_000, 3_000_000)
            assert names_below(str(tmp_path)) == ["a"], "the writer's temporary file is not listed"
            storage.delete(uri)

    def test_respects_the_umask(self, tmp_path: Path) -> None:
        # Pods of one run may run under different users.
        before = os.umask(0o022)
        try:
            storage.write_bytes(str(tmp_path / "a"), b"")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644

    def test_a_long_name(self, tmp_path: Path) -> None:
        uri = str(tmp_path / ("n" * 255))
        storage.write_bytes(uri, b"x")
        assert storage.read_bytes(uri) == b"x"


class TestUpload:
    def test_twenty_megabytes(self, bucket: str, tmp_path: Path) -> None:
        data = random.Random(3).randbytes(20 << 20)
        source = tmp_path / "source" / "file"
        source.parent.mkdir()
        source.write_bytes(data)
        uri = storage.join(bucket, "big/a")
        storage.upload(source, uri)
        entry = storage.head(uri)
        assert entry
        assert entry.size_bytes == len(data)
        assert storage.read_bytes(uri, 15 << 20, 1000) == data[15 << 20 :][:1000]
        with storage.open_object(uri) as file:
            assert file.read() == data

    def test_a_missing_file(self, bucket: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            storage.upload(tmp_path / "nothing", storage.join(bucket, "a"))


class TestDelete:
    def test_once_and_again(self, bucket: str) -> None:
        uri = storage.join(bucket, "a/b")
        storage.write_bytes(uri, b"")
        storage.delete(uri)
        assert storage.head(uri) is None
        storage.delete(uri)
        storage.delete(storage.join(bucket, "never/was"))


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(bucket: str, name: str) -> None:
    uri = storage.join(bucket, f"f {name}", name)
    assert storage.write_bytes(uri, name.encode())
    assert storage.read_bytes(uri) == name.encode()
    assert storage.read_bytes(uri, 1, 2) == name.encode()[1:3]
    entry = storage.head(uri)
    assert entry
    assert entry.uri == uri
    assert list(storage.list_objects(bucket)) == [entry]
    assert storage.list_dirs(bucket) == [f"f {name}"]
    with storage.open_object(uri) as file:
        assert file.read() == name.encode()
    storage.delete(uri)
    assert list(storage.list_objects(bucket)) == []


class TestLocal:
    def test_a_file_uri_is_its_path(self, tmp_path: Path) -> None:
        storage.write_bytes(f"file://{tmp_path}/a#b", b"x")
        assert (tmp_path / "a#b").read_bytes() == b"x"
        assert storage.read_bytes(f"file://{tmp_path}/a#b") == b"x"
        assert [entry.uri for entry in storage.list_objects(f"file://{tmp_path}")] == [str(tmp_path / "a#b")]

    def test_links_are_followed(self, tmp_path: Path) -> None:
        write_all(str(tmp_path), "real/a")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "folder").symlink_to(tmp_path / "real")
        (tmp_path / "set" / "file").symlink_to(tmp_path / "real" / "a")
        assert names_below(str(tmp_path / "set")) == ["file", "folder/a"]
        assert storage.list_dirs(str(tmp_path / "set")) == ["folder"]

    def test_a_link_to_nothing_is_listed_and_missing(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "nothing")
        assert names_below(str(tmp_path)) == ["a"]
        assert storage.read_or_none(str(tmp_path / "a")) is None

    def test_a_pipe_is_not_listed(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert names_below(str(tmp_path)) == []

    def test_what_is_deleted_meanwhile_is_listed_or_not(self, tmp_path: Path) -> None:
        """Another process of the same training deletes old checkpoints in this way."""
        paths = [tmp_path / f"{number:02}.json" for number in range(20)]
        ends = threading.Event()

        def write_and_delete() -> None:
            while not ends.is_set():
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
            ends.set()
            thread.join()

    def test_a_name_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")).write_bytes(b"")
        with pytest.raises(InvalidInputError, match=r"SEMI-E024"):
            list(storage.list_objects(str(tmp_path)))


class TestUris:
    def test_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert storage.absolute_uri("a/b/") == f"{tmp_path}/a/b"
        assert storage.absolute_uri("/a/b/") == "/a/b"
        assert storage.absolute_uri("file:///a/b") == "/a/b"
        assert storage.absolute_uri("gs://bucket/a/") == "gs://bucket/a"
        assert storage.absolute_uri("s3://bucket") == "s3://bucket"
        assert storage.absolute_uri("~/a") == str(Path.home() / "a")

    def test_local_path(self) -> None:
        assert storage.uri_to_path("a/b c") == Path("a/b c")
        assert storage.uri_to_path("file:///a/b%20c") == Path("/a/b%20c"), "taken as written"

    def test_is_remote(self) -> None:
        assert storage.is_object_store("gs://a/b")
        assert storage.is_object_store("s3://a/b")
        assert not storage.is_object_store("file:///a/b")
        assert not storage.is_object_store("gs:/a")

    def test_join(self) -> None:
        assert storage.join("gs://a/", "b", "c") == "gs://a/b/c"
        assert storage.join("/", "b") == "/b"

    @pytest.mark.parametrize("uri", ["http://host/a", "hdfs://a/b", "GS://a/b", "://a"])
    def test_an_unknown_scheme_is_refused(self, uri: str) -> None:
        for use in (
            storage.read_bytes,
            storage.head,
            storage.open_object,
            storage.delete,
            storage.list_dirs,
            storage.absolute_uri,
        ):
            with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
                use(uri)
        with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
            list(storage.list_objects(uri))
        with pytest.raises(InvalidInputError, match=r"SEMI-E022"):
            storage.write_bytes(uri, b"")

    def test_a_file_uri_with_a_host_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match=r"SEMI-E023"):
            storage.read_bytes("file://data/a")

    def test_a_uri_without_a_bucket_is_refused(self, remote: str) -> None:
        scheme = remote.partition("://")[0]
        for uri in (f"{scheme}://", f"{scheme}:///a"):
            with pytest.raises(InvalidInputError, match=r"SEMI-E020"):
                storage.head(uri)
            with pytest.raises(InvalidInputError, match=r"SEMI-E020"):
                list(storage.list_objects(uri))

    @pytest.mark.usefixtures("s3_bucket")
    def test_what_the_client_takes_for_no_bucket_is_refused_in_one_line(self) -> None:
        with pytest.raises(InvalidInputError, match=r"^s3://two words/a: [^\n]*SEMI-E026\]$"):
            storage.head("s3://two words/a")


def test_a_store_that_does_not_answer(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # This runs in S3 only, because google-cloud-storage retries for two minutes.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage._open_store.cache_clear()
    for use in (storage.read_bytes, storage.head, storage.list_dirs, storage.delete):
        with pytest.raises(SemiscaleError, match=f"^{s3_bucket}/a.*: .*127.0.0.1:9.*SEMI-E025"):
            use(f"{s3_bucket}/a")
