"""Files and objects by URI: `gs://bucket/key`, `s3://bucket/key`, `file:///path` or a plain path.

The one place that knows where bytes lie. Every function takes a URI and finds its store by the scheme. All stores
behave alike: a missing object or bucket is `FileNotFoundError`, a refused access `PermissionError`, an object store
that fails for good `SemiscaleError`. Writes are atomic: a reader sees the whole object or none. Names are taken as they
are written, without percent-encoding, as gsutil and the aws command do.

Sources: google-cloud-storage and boto3 are the vendors' own clients; credentials, endpoints and retries are theirs.
"""

import errno
import functools
import io
import os
import secrets
import stat as stat_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from components.shared.errors import Refused

CONNECTIONS = 64  # kept open by a client: above the number of threads that any stage reads with
READ_CHUNK_BYTES = 8 << 20  # of a sequential read over the network: long enough to hide 30 ms of latency


@dataclass(frozen=True)
class Entry:
    """One stored object. `version` changes when its bytes do (generation, ETag, or time and size).

    On a local disk two writes of the same size within one tick of the file system's clock, a few ms, share a version.
    """

    uri: str
    size_bytes: int
    version: str


class Store(Protocol):
    """What a place for bytes can do. Listings come in the order of the URI's code points."""

    def entries(self, prefix: str) -> Iterator[Entry]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def stat(self, uri: str) -> Entry | None: ...
    def read(self, uri: str, start: int, size: int | None) -> bytes: ...
    def open(self, uri: str) -> BinaryIO: ...
    def write(self, uri: str, data: bytes, if_absent: bool) -> bool: ...
    def upload(self, path: Path, uri: str) -> None: ...
    def delete(self, uri: str) -> None: ...


def entries(prefix: str) -> Iterator[Entry]:
    """List every object at or under a prefix: the object itself, or all below `prefix/`, in order of the URI.

    Nothing there, or no such bucket, is an empty list.
    """
    return _store(prefix).entries(prefix)


def folders(prefix: str) -> list[str]:
    """List the names of the folders directly under a prefix, empty ones included where the store keeps them."""
    return _store(prefix).folders(prefix)


def stat(uri: str) -> Entry | None:
    """Return what is stored at a URI, or None."""
    return _store(uri).stat(uri)


def read(uri: str, start: int = 0, size: int | None = None) -> bytes:
    """Read an object, or `size` bytes of it from `start`; fewer where it ends before. Raises FileNotFoundError."""
    if size == 0:  # HTTP has no range of no bytes
        if stat(uri) is None:
            raise FileNotFoundError(uri)
        return b""
    return _store(uri).read(uri, start, size)


def read_if_there(uri: str) -> bytes | None:
    """Read an object, or return None where there is none."""
    try:
        return read(uri)
    except FileNotFoundError:
        return None


def open_read(uri: str) -> BinaryIO:
    """Open an object for reading, seekable. Over the network one request fetches READ_CHUNK_BYTES, which are kept until
    a read outside of them. Raises FileNotFoundError."""
    return _store(uri).open(uri)


def write(uri: str, data: bytes, *, if_absent: bool = False) -> bool:
    """Write an object whole. With `if_absent`, return False and leave what another process wrote first."""
    return _store(uri).write(uri, data, if_absent)


def upload(path: Path, uri: str) -> None:
    """Store a local file, streaming; for what does not fit in memory twice."""
    _store(uri).upload(path, uri)


def delete(uri: str) -> None:
    """Delete an object; one that is already gone is fine."""
    _store(uri).delete(uri)


def join(folder: str, *names: str) -> str:
    """Join a URI and names with single slashes."""
    return "/".join([folder.rstrip("/"), *names])


def is_remote(uri: str) -> bool:
    """Say whether the URI names an object store, not this machine's disk."""
    return uri.startswith(("gs://", "s3://"))


def absolute(uri: str) -> str:
    """Return a URI that means the same from every working directory."""
    if is_remote(uri):
        return uri.rstrip("/")
    return str(local_path(uri).absolute())


def local_path(uri: str) -> Path:
    """Return the path of a `file://` URI or a plain path. Raises Refused for an unknown scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri).expanduser()
    if scheme != "file":
        raise Refused(f"{uri}: unknown scheme {scheme!r}; expected gs://, s3://, file:// or a path")
    if not rest.startswith("/"):
        raise Refused(f"{uri}: a file:// URI has three slashes and an absolute path, file:///like/this")
    return Path(rest)


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Take a gs:// or s3:// URI apart. Raises Refused where the bucket is missing."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket:
        raise Refused(f"{uri}: no bucket; expected {uri.partition('://')[0]}://bucket/key")
    return bucket, key


def _store(uri: str) -> Store:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    return _open_store(scheme)


@functools.cache
def _open_store(scheme: str) -> Store:
    """The clients are imported on first use: they cost half a second, and a laptop needs neither."""
    if scheme == "gs":
        from components.shared.storage_gcs import GcsStore

        return GcsStore()
    if scheme == "s3":
        from components.shared.storage_s3 import S3Store

        return S3Store()
    return LocalStore()


class RangeReader(io.RawIOBase):
    """A seekable view of one object of any store: every read is one ranged request for the bytes asked for."""

    def __init__(self, store: Store, uri: str) -> None:
        entry = store.stat(uri)
        if entry is None:
            raise FileNotFoundError(uri)
        self._store, self._uri, self._size, self._position = store, uri, entry.size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._size)  # the inherited one asks for 8 KiB at a time

    def _next(self, size: int) -> bytes:
        size = min(size, self._size - self._position)
        data = self._store.read(self._uri, self._position, size) if size > 0 else b""
        self._position += len(data)
        return data

    def buffered(self) -> BinaryIO:
        """Return the view behind a buffer of READ_CHUNK_BYTES."""
        return cast(BinaryIO, io.BufferedReader(self, READ_CHUNK_BYTES))


class LocalStore:
    """The local disk. A write goes to a temporary name beside the target and is renamed: readers see all or nothing.

    Links are followed, as every tool that reads image folders does.
    """

    def entries(self, prefix: str) -> Iterator[Entry]:
        path = local_path(prefix)
        found = [path] if path.is_file() else sorted(_files_below(path), key=str)
        yield from filter(None, map(self._entry, found))

    def folders(self, prefix: str) -> list[str]:
        path = local_path(prefix)
        return sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []

    def stat(self, uri: str) -> Entry | None:
        path = local_path(uri)
        return self._entry(path) if path.is_file() else None

    def read(self, uri: str, start: int, size: int | None) -> bytes:
        with self.open(uri) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def open(self, uri: str) -> BinaryIO:
        try:
            return local_path(uri).open("rb")
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                raise FileNotFoundError(uri) from None
            raise

    def write(self, uri: str, data: bytes, if_absent: bool) -> bool:
        path = local_path(uri)
        with _temporary_beside(path) as (temporary, file):
            file.write(data)
            _flush(file)
            if not if_absent:
                temporary.replace(path)
                return True
            try:
                os.link(temporary, path)  # fails where the target exists: a precondition, like the object stores'
            except FileExistsError:
                return False
            return True

    def upload(self, path: Path, uri: str) -> None:
        target = local_path(uri)
        with path.open("rb") as source, _temporary_beside(target) as (temporary, file):
            while block := source.read(1 << 20):
                file.write(block)
            _flush(file)
            temporary.replace(target)

    def delete(self, uri: str) -> None:
        local_path(uri).unlink(missing_ok=True)

    @staticmethod
    def _entry(path: Path) -> Entry | None:
        """A link to nothing is listed as it is: who reads it then finds it missing, instead of never hearing of it."""
        status = path.stat() if path.exists() else path.lstat()
        if not stat_module.S_ISREG(status.st_mode) and not stat_module.S_ISLNK(status.st_mode):
            return None  # a pipe or a device: reading it could wait forever
        return Entry(str(path), status.st_size, f"{status.st_mtime_ns}-{status.st_size}")


_TEMPORARY = ".writing-"
_NO_SUCH_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _files_below(folder: Path) -> Iterator[Path]:
    """Walk a folder, without what is being written. Raises OSError for a folder that cannot be read."""
    if not folder.is_dir():
        return
    for parent, _, names in os.walk(folder, onerror=_raise, followlinks=True):
        for name in names:
            if not name.startswith(_TEMPORARY):
                yield Path(parent, _utf8(parent, name))


def _raise(error: OSError) -> None:
    raise error


def _utf8(folder: str, name: str) -> str:
    if name.isascii() or name == name.encode(errors="replace").decode():
        return name
    raise Refused(f"{folder}: the file name {name!a} is not UTF-8; rename it")


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + secrets.token_hex(8))
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: BinaryIO) -> None:
    """Bring bytes to the disk before the name: after a power cut a receipt must not outlive what it vouches for."""
    file.flush()
    os.fsync(file.fileno())
