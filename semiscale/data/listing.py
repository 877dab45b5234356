"""List the shards under a URI and give each a unique name.

A shard is a WebDataset tar, a Parquet file, or a slice of loose files.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import PurePosixPath
from typing import Literal

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.data.shard import (
    COMPRESSED_SUFFIXES,
    CONTAINER_SUFFIXES,
    LOOSE_FILES_MARK,
    LooseFile,
    Shard,
    is_hidden,
    media_suffixes,
)

# Mean number of loose files in a shard: a few seconds of scanning.
FILES_PER_SHARD = 1024

# About one shard in fifty reaches this length.
MAX_FILES_PER_SHARD = 4 * FILES_PER_SHARD


def list_shards(uris: Iterable[str], videos: bool = False) -> list[Shard]:
    """List the shards under URIs, in order.

    Hidden files and folders, whose names start with a dot, are left out: macOS and Jupyter leave them. No two shards
    have the same name. A later one is prefixed with the last folder of its URI, or a number. A tar or Parquet file that
    lies below two of the URIs is one shard, with its first name.

    Args:
        uris: Folders, files, or patterns such as `folder/part-*.tar`.
        videos: Whether loose files are videos.

    Raises:
        InvalidInputError: A URI holds no tar, Parquet, image or video file.

    Cost:
        One listing of each URI, and about 1 kB of memory a shard and 700 bytes a loose file.
    """
    by_name: dict[str, Shard] = {}
    containers: dict[str, Shard] = {}
    listed = []
    for number, uri in enumerate(uris, 1):
        for shard in _list_shards_under(uri, media_suffixes(videos)):
            listed.append(containers.get(shard.uri) or _with_unique_name(shard, uri, number, by_name))
            by_name[listed[-1].name] = listed[-1]
            if not shard.files:
                containers[shard.uri] = listed[-1]
    return listed


def _with_unique_name(shard: Shard, uri: str, number: int, by_name: Mapping[str, Shard]) -> Shard:
    """Give a shard a name that no other has and that survives a move of the bucket.

    The same shard keeps its name if it is listed again.
    """
    renamed, prefixes = shard, _prefixes(uri, number)
    while by_name.get(renamed.name, renamed) != renamed:
        prefix = next(prefixes)
        renamed = shard.model_copy(update={"name": f"{prefix}/{shard.name}", "prefix": prefix})
    return renamed


def _prefixes(uri: str, number: int) -> Iterator[str]:
    """Yield the last folder of a URI, then the same with numbers: `b`, `b-2`, `b-3`."""
    path = _pattern(storage.absolute_uri(uri))[0].rpartition("://")[2]
    folder = path.rpartition("/")[2] if "/" in path else ""
    if folder:
        yield folder
    for suffix in count(number):
        yield f"{folder}-{suffix}" if folder else str(suffix)


def _list_shards_under(uri: str, suffixes: tuple[str, ...]) -> list[Shard]:
    if not uri.strip():
        raise InvalidInputError("SEMI-E050", "URI: It is empty. Give a folder, a .tar or a .parquet file.")
    root, pattern = _pattern(storage.absolute_uri(uri))
    objects = [(_relative_name(entry.uri, root), entry) for entry in storage.list_objects(root)]
    visible = [(name, entry) for name, entry in objects if not is_hidden(name) and fnmatch.fnmatchcase(name, pattern)]
    _check_not_compressed(root, [name for name, _ in visible])
    containers = [_container(name, entry) for name, entry in visible if name.lower().endswith(CONTAINER_SUFFIXES)]
    files = [_loose_file(name, entry) for name, entry in visible if name.lower().endswith(suffixes)]
    slices = [_shard_of_files(root, part) for part in _split_loose_files(files)]
    if not containers and not slices:
        problem = f"{len(objects)} files, none of them usable" if objects else "nothing here"
        expected = ", ".join((*CONTAINER_SUFFIXES, *suffixes))
        raise InvalidInputError("SEMI-E052", f"{uri}: {problem}. Check the URI, which must hold {expected} files.")
    return [*containers, *slices]


def _pattern(uri: str) -> tuple[str, str]:
    """Split a URI such as `folder/part-*.tar` into the folder and the pattern of names.

    Any other URI stands for all objects below it.
    """
    folder, _, last = uri.rpartition("/")
    return (folder, last) if "*" in last else (uri, "*")


def _check_not_compressed(root: str, names: list[str]) -> None:
    for name in names:
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            raise InvalidInputError(
                "SEMI-E051",
                f"{root}: {name} is a compressed tar, whose images cannot be read one by one. Decompress it.",
            )


def _container(name: str, entry: storage.ObjectInfo) -> Shard:
    kind: Literal["tar", "parquet"] = "tar" if name.lower().endswith(".tar") else "parquet"
    return Shard(uri=entry.uri, name=name, kind=kind, size_bytes=entry.size_bytes, version=entry.version)


def _loose_file(name: str, entry: storage.ObjectInfo) -> LooseFile:
    return LooseFile(uri=entry.uri, name=name, size_bytes=entry.size_bytes, version=entry.version)


def _split_loose_files(files: list[LooseFile]) -> list[list[LooseFile]]:
    """Split files at names that a hash selects, so that adding a file changes one shard alone.

    A shard has at most MAX_FILES_PER_SHARD files. After such a forced split, the files up to the next selected name
    move.
    """
    slices: list[list[LooseFile]] = []
    for file in files:
        if not slices or len(slices[-1]) == MAX_FILES_PER_SHARD or _is_split_point(file.name):
            slices.append([])
        slices[-1].append(file)
    return slices


def _is_split_point(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % FILES_PER_SHARD == 0


def _shard_of_files(root: str, files: list[LooseFile]) -> Shard:
    """Return the shard of some files, named by the first one.

    The name, and with it the order of equal scores, stays the same if other files change.
    """
    size = sum(file.size_bytes for file in files)
    name = f"{LOOSE_FILES_MARK}{files[0].name}"
    return Shard(uri=root, name=name, kind="files", size_bytes=size, version="", files=files)


def _relative_name(uri: str, root: str) -> str:
    return uri.removeprefix(root).lstrip("/") or PurePosixPath(uri).name
