"""Read and write objects by URI.

A URI is `gs://bucket/key`, `s3://bucket/key`, `file:///path` or a path. All stores behave alike. A missing object or
bucket is `FileNotFoundError`, and a refused access is `PermissionError`. An object store that fails after all retries
is `SemiscaleError`. Writes are atomic, so a reader sees the whole object or none. Names are used as they are written,
without percent-encoding, as gsutil and the aws command do.

Credentials, endpoints and retries are those of the vendors' own clients, google-cloud-storage and boto3.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from semiscale.storage.base import ObjectInfo, ObjectStore
from semiscale.storage.local import LocalStore, uri_to_path

__all__ = [
    "ObjectInfo", "absolute_uri", "compare_and_swap", "delete", "head", "is_object_store", "join", "list_dirs",
    "list_objects", "open_object", "read_bytes", "read_or_none", "upload", "uri_to_path", "write_bytes",
]  # fmt: skip


def list_objects(prefix: str) -> Iterator[ObjectInfo]:
    """List the object at a prefix and every object below `prefix/`.

    They are in order of their URIs. The listing of a missing folder or bucket is empty.

    Cost:
        An object store answers one request for every thousand objects. A local disk sorts the paths in memory.
    """
    return _store(prefix).entries(prefix)


def list_dirs(prefix: str) -> list[str]:
    """List the names of the folders directly under a prefix.

    Empty folders are included if the store keeps them.
    """
    return _store(prefix).folders(prefix)


def head(uri: str) -> ObjectInfo | None:
    """Return the size and the version of an object, or None if there is no object."""
    return _store(uri).stat(uri)


def read_bytes(uri: str, start: int = 0, size: int | None = None, version: str = "") -> bytes:
    """Read an object or a range of it.

    Args:
        uri: The object.
        start: First byte.
        size: Number of bytes. Fewer are returned if the object ends earlier.
        version: Version that was listed. It is a condition of the request, so it needs no request of its own.

    Returns:
        The bytes. They are empty if `start` is at the object's end or after it.

    Raises:
        FileNotFoundError: There is no object.
        SemiscaleError: The object has another version.
    """
    # An HTTP range cannot be empty.
    if size == 0:
        if head(uri) is None:
            raise FileNotFoundError(uri)
        return b""
    return _store(uri).read(uri, start, size, version)


def read_or_none(uri: str) -> bytes | None:
    """Read an object, or return None if there is no object."""
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return None


def open_object(uri: str, version: str = "", *, prefetch: bool = False) -> BinaryIO:
    """Open an object for reading, as a seekable file.

    Over the network one request fetches READ_CHUNK_BYTES. They are buffered until a read outside of them. All requests
    read the same version.

    Args:
        uri: The object.
        version: Version that was listed. Without it, the version at the time of opening is read.
        prefetch: Whether a thread prefetches the next READ_CHUNK_BYTES. It helps if the object is read in order over
            the network.

    Raises:
        FileNotFoundError: There is no object.
        SemiscaleError: The object has another version. Reads of the file raise it too.
    """
    return _store(uri).open(uri, version, prefetch=prefetch)


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False) -> bool:
    """Write an object.

    Args:
        uri: The object.
        data: Its bytes.
        if_absent: Whether an object that exists is kept.

    Returns:
        False if `if_absent` is set and the object exists already.
    """
    return _store(uri).write(uri, data, if_absent)


def compare_and_swap(uri: str, old: bytes | None, new: bytes) -> bool:
    """Replace an object if its content is still `old`.

    Args:
        uri: A small object that several processes change.
        old: Content that this process read, or None if there was no object.
        new: Content to write.

    Returns:
        False if another process changed the object first. Read it again and repeat.
    """
    return write_bytes(uri, new, if_absent=True) if old is None else _store(uri).replace(uri, old, new)


def upload(path: Path, uri: str) -> None:
    """Store a local file.

    Args:
        path: The local file.
        uri: The object to write.

    Cost:
        Memory for some chunks of the file, whatever its size.
    """
    _store(uri).upload(path, uri)


def delete(uri: str) -> None:
    """Delete an object, if it exists."""
    _store(uri).delete(uri)


def join(folder: str, *names: str) -> str:
    """Join a URI and names with single slashes."""
    return "/".join([folder.rstrip("/"), *names])


def is_object_store(uri: str) -> bool:
    """Return whether the URI names an object store rather than a local disk."""
    return uri.startswith(("gs://", "s3://"))


def absolute_uri(uri: str) -> str:
    """Return a URI that names the same object from every working directory."""
    if is_object_store(uri):
        return uri.rstrip("/")
    return str(uri_to_path(uri).absolute())


def _store(uri: str) -> ObjectStore:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    return _open_store(scheme)


@functools.cache
def _open_store(scheme: str) -> ObjectStore:
    """Return the store of a scheme.

    The clients are imported on first use. An import takes half a second, and a run on a local disk needs none.
    """
    if scheme == "gs":
        from semiscale.storage.gcs import GcsStore

        return GcsStore()
    if scheme == "s3":
        from semiscale.storage.s3 import S3Store

        return S3Store()
    return LocalStore()
