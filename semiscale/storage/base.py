"""Define the interface of a store and the code that all stores share."""

import io
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.prefetch import run_in_thread

# Connections that a client keeps open. No stage reads with more threads.
MAX_CONNECTIONS = 64
# Size of a sequential read over the network, which hides 30 ms of latency.
READ_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object. `version` changes when its bytes do (generation, ETag, or time and size).

    On a local disk two writes of the same size within one tick of the file system's clock, a few ms, share a version.
    """

    uri: str
    size_bytes: int
    version: str


class ObjectStore(Protocol):
    """A place for objects. Listings are in the order of the URIs' code points."""

    def entries(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def stat(self, uri: str) -> ObjectInfo | None: ...
    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes: ...
    def open(self, uri: str, version: str, ahead: bool) -> BinaryIO: ...
    def write(self, uri: str, data: bytes, if_absent: bool) -> bool: ...
    def replace(self, uri: str, old: bytes, new: bytes) -> bool: ...
    def upload(self, path: Path, uri: str) -> None: ...
    def delete(self, uri: str) -> None: ...


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Split a gs:// or s3:// URI, and refuse one without a bucket."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket:
        raise InvalidInputError(
            "SEMI-E020", f"{uri}: the URI has no bucket. Write {uri.partition('://')[0]}://bucket/key."
        )
    return bucket, key


def object_changed_error(uri: str) -> SemiscaleError:
    """Return the error of an object that does not have the expected version."""
    return SemiscaleError("SEMI-E021", f"{uri}: the object changed since it was listed. Run the plan again.")


class _Chunk(NamedTuple):
    """Bytes of an object that are being fetched, or were."""

    start: int
    data: Future[bytes]


class RangeReader(io.RawIOBase):
    """A seekable view of one object of any store: every read is one ranged request for the bytes asked for.

    With `ahead`, once a read has gone on where the last one ended, a thread fetches the READ_CHUNK_BYTES that follow
    while these are used. Memory: as many.
    """

    def __init__(self, store: ObjectStore, uri: str, version: str, ahead: bool = False) -> None:
        entry = store.stat(uri)
        if entry is None:
            raise FileNotFoundError(uri)
        if version and entry.version != version:
            raise object_changed_error(uri)
        self._store, self._uri, self._version, self._size = store, uri, entry.version, entry.size_bytes
        self._position = 0
        self._ahead, self._last_end = ahead, -1
        self._chunk: _Chunk | None = None

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
        if size <= 0:
            return b""
        fetched = self._fetched(size)
        follows = bool(fetched) or self._position == self._last_end
        data = fetched or self._read(self._position, size)
        self._position = self._last_end = self._position + len(data)
        if self._ahead and follows and not self._holds(self._position) and self._position < self._size:
            start, size = self._position, min(READ_CHUNK_BYTES, self._size - self._position)
            self._chunk = _Chunk(start, run_in_thread(lambda: self._read(start, size)))
        return data

    def _read(self, start: int, size: int) -> bytes:
        return self._store.read(self._uri, start, size, self._version)

    def _holds(self, position: int) -> bool:
        return self._chunk is not None and 0 <= position - self._chunk.start < READ_CHUNK_BYTES

    def _fetched(self, size: int) -> bytes:
        """Return what has been fetched of the next bytes, at most `size`; waits for what is on its way."""
        if self._chunk is None or not self._holds(self._position):
            return b""
        start = self._position - self._chunk.start
        return self._chunk.data.result()[start : start + size]

    def buffered(self) -> BinaryIO:
        """Return the view behind a buffer of READ_CHUNK_BYTES."""
        return cast(BinaryIO, io.BufferedReader(self, READ_CHUNK_BYTES))
