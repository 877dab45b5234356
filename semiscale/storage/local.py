"""Store objects on the local disk."""

import errno
import fcntl
import os
import secrets
import stat as stat_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from semiscale.common.errors import InvalidInputError
from semiscale.storage.base import ObjectInfo, object_changed_error


def uri_to_path(uri: str) -> Path:
    """Return the path of a `file://` URI or of a plain path.

    Raises:
        InvalidInputError: The scheme is another one, or the path of the URI is not absolute.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri).expanduser()
    if scheme != "file":
        raise InvalidInputError(
            "SEMI-E022", f"{uri}: the scheme {scheme!r} is unknown. Use gs://, s3://, file:// or a path."
        )
    if not rest.startswith("/"):
        raise InvalidInputError(
            "SEMI-E023", f"{uri}: the path is not absolute. Use three slashes, as in file:///data/images."
        )
    return Path(rest)


class LocalStore:
    """Objects on the local disk.

    A write goes to a temporary file in the target's folder, which is then renamed. A reader sees the whole object or
    none. Symbolic links are followed, as in other tools that read image folders.
    """

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        path = uri_to_path(prefix)
        files = [path] if path.is_file() else sorted(_files_below(path), key=str)
        yield from filter(None, map(self._entry, files))

    def folders(self, prefix: str) -> list[str]:
        path = uri_to_path(prefix)
        return sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []

    def stat(self, uri: str) -> ObjectInfo | None:
        path = uri_to_path(uri)
        return self._entry(path) if path.is_file() else None

    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes:
        with self.open(uri, version, prefetch=False) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def open(self, uri: str, version: str, prefetch: bool) -> BinaryIO:
        path = uri_to_path(uri)
        try:
            # A link in a data set may name a device or a pipe. A read of it might never end.
            if not stat_module.S_ISREG(path.stat().st_mode):
                raise FileNotFoundError(uri)
            file = path.open("rb")
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                raise FileNotFoundError(uri) from None
            raise
        if version and version != _version(os.fstat(file.fileno())):
            file.close()
            raise object_changed_error(uri)
        return file

    def write(self, uri: str, data: bytes, if_absent: bool) -> bool:
        path = uri_to_path(uri)
        with _temporary_sibling(path) as (temporary, file):
            file.write(data)
            _flush(file)
            if not if_absent:
                temporary.replace(path)
                return True
            # Creating a hard link fails if the target exists. It replaces the precondition of the object stores.
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True

    def replace(self, uri: str, old: bytes, new: bytes) -> bool:
        path = uri_to_path(uri)
        if not path.parent.is_dir():
            return False
        with _locked(path.parent):
            return path.is_file() and path.read_bytes() == old and self.write(uri, new, if_absent=False)

    def upload(self, path: Path, uri: str) -> None:
        target = uri_to_path(uri)
        with path.open("rb") as source, _temporary_sibling(target) as (temporary, file):
            while block := source.read(1 << 20):
                file.write(block)
            _flush(file)
            temporary.replace(target)

    def delete(self, uri: str) -> None:
        uri_to_path(uri).unlink(missing_ok=True)

    @staticmethod
    def _entry(path: Path) -> ObjectInfo | None:
        """Return the entry of a file, or None if there is no regular file.

        A broken link has an entry without a version, so that its reader reports the missing file. The path is examined
        once, because another process may delete it between two calls.
        """
        try:
            status = path.stat()
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return ObjectInfo(str(path), 0, "") if path.is_symlink() else None
            raise
        # A read of a pipe or a device might never end.
        if not stat_module.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(str(path), status.st_size, _version(status))


_TEMPORARY = ".writing-"
_NO_SUCH_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except those that are being written.

    Each directory is walked once, even if several links lead to it.

    Raises:
        OSError: A folder cannot be read.
        InvalidInputError: A name is not UTF-8.

    Cost:
        Memory for the identities of all directories.
    """
    if not folder.is_dir():
        return
    visited = {_identity(folder)}
    for parent, children, names in os.walk(folder, onerror=_raise, followlinks=True):
        # Real directories come before links to them. In reversed order, the first name of a directory is kept.
        in_order = sorted(children, key=lambda name: (Path(parent, name).is_symlink(), name))
        by_identity = {_identity(Path(parent, name)): name for name in reversed(in_order)}
        children[:] = [name for identity, name in reversed(by_identity.items()) if identity not in visited]
        visited.update(by_identity)
        for name in names:
            if not name.startswith(_TEMPORARY):
                yield Path(parent, _check_utf8(parent, name))


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and the inode of a folder.

    They are the same through every link.
    """
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def _check_utf8(folder: str, name: str) -> str:
    """Return a file name, and refuse one that is not UTF-8."""
    if name.isascii() or name == name.encode(errors="replace").decode():
        return name
    raise InvalidInputError("SEMI-E024", f"{folder}: the file name {name!a} is not UTF-8. Rename the file.")


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a temporary file in a path's folder.

    It is deleted after the block, unless it was renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + secrets.token_hex(8))
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    except OSError as error:
        # The error of a full disk does not name the file.
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which only `replace` uses.

    The kernel releases it if the process dies.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    """Write the bytes to the disk before the file gets its name.

    Otherwise a receipt may survive a power cut and the files that it refers to may not.
    """
    file.flush()
    os.fsync(file.fileno())
