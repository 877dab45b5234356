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
    """Return the path of a `file://` URI or a plain path. Raises InvalidInputError for an unknown scheme."""
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
    """The local disk. A write goes to a temporary name beside the target and is renamed: readers see all or nothing.

    Links are followed, as every tool that reads image folders does.
    """

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        path = uri_to_path(prefix)
        found = [path] if path.is_file() else sorted(_files_below(path), key=str)
        yield from filter(None, map(self._entry, found))

    def folders(self, prefix: str) -> list[str]:
        path = uri_to_path(prefix)
        return sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []

    def stat(self, uri: str) -> ObjectInfo | None:
        path = uri_to_path(uri)
        return self._entry(path) if path.is_file() else None

    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes:
        with self.open(uri, version, ahead=False) as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def open(self, uri: str, version: str, ahead: bool) -> BinaryIO:
        path = uri_to_path(uri)
        try:
            # A device or a pipe, which a link in a data set may name, could be read for ever.
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
            try:
                os.link(temporary, path)  # fails where the target exists: a precondition, like the object stores'
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
        """A link to nothing is listed, without a version: who reads it finds it missing, instead of never hearing of
        it. Asked once: between two questions another process may delete it.
        """
        try:
            status = path.stat()
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return ObjectInfo(str(path), 0, "") if path.is_symlink() else None
            raise
        if not stat_module.S_ISREG(status.st_mode):
            return None  # a pipe or a device: reading it could wait forever
        return ObjectInfo(str(path), status.st_size, _version(status))


_TEMPORARY = ".writing-"
_NO_SUCH_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Walk a folder, without what is being written, each directory once, however many links lead to it.

    Raises OSError for a folder that cannot be read.
    """
    if not folder.is_dir():
        return
    walked = {_identity(folder)}
    for parent, below, names in os.walk(folder, onerror=_raise, followlinks=True):
        here = sorted(below, key=lambda name: (Path(parent, name).is_symlink(), name))
        fresh = {_identity(Path(parent, name)): name for name in reversed(here)}  # the first of equals stays
        below[:] = [name for identity, name in reversed(fresh.items()) if identity not in walked]
        walked.update(fresh)
        for name in names:
            if not name.startswith(_TEMPORARY):
                yield Path(parent, _utf8(parent, name))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def _utf8(folder: str, name: str) -> str:
    if name.isascii() or name == name.encode(errors="replace").decode():
        return name
    raise InvalidInputError("SEMI-E024", f"{folder}: the file name {name!a} is not UTF-8. Rename the file.")


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + secrets.token_hex(8))
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    except OSError as error:
        if error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which only `replace` asks for; a process that dies gives it back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    """Bring bytes to the disk before the name: after a power cut a receipt must not outlive what it vouches for."""
    file.flush()
    os.fsync(file.fileno())
