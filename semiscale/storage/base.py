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
    """One stored object.

    `version` changes with the bytes. It is the generation in GCS, the ETag in S3, and the time and the size of a file.
    On a local disk, two writes of the same size within one tick of the file system's clock share a version. A tick is
    a few ms.
    """

    uri: str
    size_bytes: int
    version: str


class ObjectStore(Protocol):
    """The operations of a store.

    Listings are in the order of the code points of the URIs.
    """

    def entries(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def stat(self, uri: str) -> ObjectInfo | None: ...
    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes: ...
    def open(self, uri: str, version: str, prefetch: bool) -> BinaryIO: ...
    def write(self, uri: str, data: bytes, if_absent: bool) -> bool: ...
    def replace(self, uri: str, old: bytes, new: bytes) -> bool: ...
    def upload(self, path: Path, uri: str) -> None: ...
    def delete(self, uri: str) -> None: ...


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Split a gs:// or s3:// URI into its bucket and its key.

    Returns:
        The bucket, and the key, which is empty for the bucket itself.

    Raises:
        InvalidInputError: The URI has no bucket.
    """
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
    """A range of an object that a thread has fetched or is fetching."""

    start: int
    data: Future[bytes]


class RangeReader(io.RawIOBase):
    """A seekable view of one object of any store. Every read is one ranged request.

    Args:
        store: Store of the object.
        uri: The object.
        version: Version to read, or "" for the current one.
        prefetch: Whether a thread fetches the next READ_CHUNK_BYTES. It begins when a read starts at the end of the
            last one.

    Raises:
        FileNotFoundError: There is no object.
        SemiscaleError: The object has another version.

    Cost:
        Memory for READ_CHUNK_BYTES with `prefetch`.
    """

    def __init__(self, store: ObjectStore, uri: str, version: str, prefetch: bool = False) -> None:
        entry = store.stat(uri)
        if entry is None:
            raise FileNotFoundError(uri)
        if version and entry.version != version:
            raise object_changed_error(uri)
        self._store, self._uri, self._version, self._size = store, uri, entry.version, entry.size_bytes
        self._position = 0
        self._prefetch, self._last_end = prefetch, -1
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
        data = self._read_next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # The inherited method reads 8 KiB at a time.
        return self._read_next(self._size)

    def _read_next(self, size: int) -> bytes:
        size = min(size, self._size - self._position)
        if size <= 0:
            return b""
        prefetched = self._read_prefetched(size)
        is_sequential = bool(prefetched) or self._position == self._last_end
        data = prefetched or self._read(self._position, size)
        self._position = self._last_end = self._position + len(data)
        if self._prefetch and is_sequential and not self._is_prefetched(self._position) and self._position < self._size:
            start, size = self._position, min(READ_CHUNK_BYTES, self._size - self._position)
            self._chunk = _Chunk(start, run_in_thread(lambda: self._read(start, size)))
        return data

    def _read(self, start: int, size: int) -> bytes:
        return self._store.read(self._uri, start, size, self._version)

    def _is_prefetched(self, position: int) -> bool:
        return self._chunk is not None and 0 <= position - self._chunk.start < READ_CHUNK_BYTES

    def _read_prefetched(self, size: int) -> bytes:
        """Return at most `size` of the next bytes, or nothing if they are not prefetched.

        It waits for a request in progress.
        """
        if self._chunk is None or not self._is_prefetched(self._position):
            return b""
        start = self._position - self._chunk.start
        return self._chunk.data.result()[start : start + size]

    def buffered(self) -> BinaryIO:
        """Return the view with a buffer of READ_CHUNK_BYTES."""
        return cast(BinaryIO, io.BufferedReader(self, READ_CHUNK_BYTES))
