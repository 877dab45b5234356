"""Test that writing, replacing, uploading and deleting are the same in all stores."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semiscale import storage
from tests.support.objects import list_names

UNUSUAL_NAMES = [
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


@contextmanager
def run_writer(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that alternates between two contents of an object.

    The body of the context begins after the first write and must kill the process.
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


def test_a_write_replaces_the_object_and_creates_folders(bucket: str) -> None:
    uri = storage.join(bucket, "a/b/c")
    assert storage.write_bytes(uri, b"first, longer")
    assert storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"


def test_if_absent_never_replaces_an_object(bucket: str) -> None:
    uri = storage.join(bucket, "a/b")
    assert storage.write_bytes(uri, b"first", if_absent=True)
    assert not storage.write_bytes(uri, b"second", if_absent=True)
    assert storage.read_bytes(uri) == b"first"
    assert list_names(bucket) == ["a/b"]


def test_if_absent_never_replaces_a_large_object(bucket: str) -> None:
    uri = storage.join(bucket, "a")
    # google-cloud-storage uses another protocol above 8 MiB.
    data = random.Random(2).randbytes(9 << 20)
    assert storage.write_bytes(uri, data, if_absent=True)
    assert not storage.write_bytes(uri, b"second" + data, if_absent=True)
    assert storage.read_bytes(uri) == data


def test_exactly_one_of_two_processes_creates_an_object(bucket: str) -> None:
    # For GCS this only tests that the request has the precondition. See servers.gcs_server.
    rounds = 20
    program = (
        "import sys\n"
        "from semiscale import storage\n"
        "bucket, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "storage.head(bucket + '/warm')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for number in range(rounds):\n"
        "    print(storage.write_bytes(f'{bucket}/{number}', name.encode(), if_absent=True), flush=True)\n"
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


def test_compare_and_swap_never_replaces_another_value(bucket: str) -> None:
    uri = storage.join(bucket, "a/b")
    assert not storage.compare_and_swap(uri, b"first", b"second")
    assert storage.compare_and_swap(uri, None, b"first")
    assert not storage.compare_and_swap(uri, None, b"second")
    assert storage.compare_and_swap(uri, b"first", b"second")
    assert not storage.compare_and_swap(uri, b"first", b"third")
    assert storage.read_bytes(uri) == b"second"
    assert list_names(bucket) == ["a/b"]


def test_two_processes_count_with_compare_and_swap(bucket: str) -> None:
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


def test_a_reader_never_sees_half_a_write(bucket: str) -> None:
    uri = storage.join(bucket, "a")
    with run_writer(uri) as writer:
        reads = [storage.read_bytes(uri) for _ in range(10)]
        writer.kill()
    assert {(len(data), data.count(data[0])) for data in reads} == {(3_000_000, 3_000_000)}


def test_a_killed_writer_leaves_the_object_whole(tmp_path: Path) -> None:
    # This runs on the disk only. The test servers of the other stores accept half a request as a whole one.
    uri = storage.join(str(tmp_path), "a")
    for _ in range(3):
        with run_writer(uri) as writer:
            writer.kill()
        data = storage.read_bytes(uri)
        assert (len(data), data.count(data[0])) == (3_000_000, 3_000_000)
        assert list_names(str(tmp_path)) == ["a"], "the temporary file of the writer must not be listed"
        storage.delete(uri)


def test_a_local_file_respects_the_umask(tmp_path: Path) -> None:
    # Pods of one run may run under different users.
    before = os.umask(0o022)
    try:
        storage.write_bytes(str(tmp_path / "a"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_local_file_can_have_the_longest_name(tmp_path: Path) -> None:
    uri = str(tmp_path / ("n" * 255))
    storage.write_bytes(uri, b"x")
    assert storage.read_bytes(uri) == b"x"


def test_a_file_of_20_megabytes_is_uploaded(bucket: str, tmp_path: Path) -> None:
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


def test_a_missing_file_cannot_be_uploaded(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "nothing", storage.join(bucket, "a"))


def test_an_object_can_be_deleted_twice(bucket: str) -> None:
    uri = storage.join(bucket, "a/b")
    storage.write_bytes(uri, b"")
    storage.delete(uri)
    assert storage.head(uri) is None
    storage.delete(uri)
    storage.delete(storage.join(bucket, "never/was"))


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_unusual_names_work_in_every_call(bucket: str, name: str) -> None:
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
