"""Read and write objects by URI: `gs://bucket/key`, `s3://bucket/key`, `file:///path` or a path.

All stores behave alike. A missing object or bucket is `FileNotFoundError`, and a refused access is `PermissionError`.
An object store that fails for good is `SemiscaleError`. Writes are atomic: a reader sees the whole object or none.
Names are used as they are written, without percent-encoding, as gsutil and the aws command do.

Sources: google-cloud-storage and boto3 are the vendors' own clients. Credentials, endpoints and retries are theirs.
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
    """List every object at or under a prefix: the object itself, or all below `prefix/`, in order of the URI.

    Nothing there, or no such bucket, is an empty list.
    """
    return _store(prefix).entries(prefix)


def list_dirs(prefix: str) -> list[str]:
    """List the names of the folders directly under a prefix, empty ones included where the store keeps them."""
    return _store(prefix).folders(prefix)


def head(uri: str) -> ObjectInfo | None:
    """Return what is stored at a URI, or None."""
    return _store(uri).stat(uri)


def read_bytes(uri: str, start: int = 0, size: int | None = None, version: str = "") -> bytes:
    """Read an object or a range of it.

    Args:
        uri: The object.
        start: First byte.
        size: Number of bytes. Fewer are returned if the object ends before.
        version: Version that was listed. It is a condition of the request and costs nothing.

    Raises:
        FileNotFoundError: There is no object.
        SemiscaleError: The object has another version.
    """
    if size == 0:  # HTTP has no range of no bytes
        if head(uri) is None:
            raise FileNotFoundError(uri)
        return b""
    return _store(uri).read(uri, start, size, version)


def read_or_none(uri: str) -> bytes | None:
    """Read an object, or return None where there is none."""
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return None


def open_object(uri: str, version: str = "", *, ahead: bool = False) -> BinaryIO:
    """Open an object for reading, seekable. Over the network one request fetches READ_CHUNK_BYTES, which are kept until
    a read outside of them; all of them see one version, the one that was listed where it is given. Raises
    FileNotFoundError, and what `read` raises.

    `ahead` is for who reads all of it in order over the network: a thread fetches as much again, meanwhile.
    """
    return _store(uri).open(uri, version, ahead)


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False) -> bool:
    """Write an object. With `if_absent`, return False if it exists already."""
    return _store(uri).write(uri, data, if_absent)


def compare_and_swap(uri: str, old: bytes | None, new: bytes) -> bool:
    """Replace an object if its content still is `old`.

    Args:
        uri: A small object that several processes change.
        old: Content that was read, or None if there was no object.
        new: Content to write.

    Returns:
        False if another process changed the object first. Read it again and repeat.
    """
    return write_bytes(uri, new, if_absent=True) if old is None else _store(uri).replace(uri, old, new)


def upload(path: Path, uri: str) -> None:
    """Store a local file in chunks, so that it never lies in memory as a whole."""
    _store(uri).upload(path, uri)


def delete(uri: str) -> None:
    """Delete an object. A missing object is no error."""
    _store(uri).delete(uri)


def join(folder: str, *names: str) -> str:
    """Join a URI and names with single slashes."""
    return "/".join([folder.rstrip("/"), *names])


def is_object_store(uri: str) -> bool:
    """Return whether the URI names an object store rather than a local disk."""
    return uri.startswith(("gs://", "s3://"))


def absolute_uri(uri: str) -> str:
    """Return a URI that means the same from every working directory."""
    if is_object_store(uri):
        return uri.rstrip("/")
    return str(uri_to_path(uri).absolute())


def _store(uri: str) -> ObjectStore:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    return _open_store(scheme)


@functools.cache
def _open_store(scheme: str) -> ObjectStore:
    """The clients are imported on first use: they cost half a second, and a laptop needs neither."""
    if scheme == "gs":
        from semiscale.storage.gcs import GcsStore

        return GcsStore()
    if scheme == "s3":
        from semiscale.storage.s3 import S3Store

        return S3Store()
    return LocalStore()
