"""Define shards, shard groups and samples, which all readers share."""

import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from semiscale import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv", ".webm")
# If a sample has several label files, the first suffix of this list counts.
LABEL_SUFFIXES = (".cls", ".json", ".txt")
CONTAINER_SUFFIXES = (".tar", ".parquet")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# The pixels of the largest image that is decoded, at 16 bits and with alpha, take two thirds of this.
MAX_IMAGE_BYTES = 1 << 30
TOO_LARGE = "more than 1 GiB"
# The name of a shard of loose files is this and the name of its first file, perhaps after the prefix of its pool.
LOOSE_FILES_MARK = "files from "


class LooseFile(BaseModel):
    """One file of a shard of loose files. `name` is its path below the listed folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    name: str
    size_bytes: int
    version: str


class Shard(BaseModel):
    """A tar, a Parquet file or a part of one, or some loose files.

    `name` is relative to the URI that it was listed from, so it survives a move of the bucket. `prefix` was put before
    the name if another shard has the same name. `rows` is set if a shard is a part of a Parquet file: the first row,
    and the one after the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    name: str
    kind: Literal["tar", "parquet", "files"]
    size_bytes: int
    version: str
    files: list[LooseFile] = []
    prefix: str = ""
    rows: tuple[int, int] | None = None

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the shard's URI, version, rows and prefix."""
        identity = [self.uri, self.version, *(f"{file.name}@{file.version}" for file in self.files)]
        identity += [self.prefix] if self.prefix else []
        identity += [str(self.rows)] if self.rows else []
        return hashlib.blake2b("\0".join(identity).encode(), digest_size=8).hexdigest()


class ShardGroup(BaseModel):
    """A group of shards whose scores are ranked in one file and merged together. It is a `unit` on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    shards: list[Shard]


@dataclass(frozen=True)
class SampleFields:
    """The columns of a Parquet file, or the keys of .json members.

    Attributes:
        image: The column with the images. It is not used for a tar.
        label: The column or key with the label, or empty if no label is read.
        videos: Whether samples are videos.
    """

    image: str = "image"
    label: str = "label"
    videos: bool = False


@dataclass(frozen=True)
class Sample:
    """One image or video as it is stored.

    `offset` is the position of its first byte in the object at `uri`, or -1 inside a Parquet file. `problem` says why
    there is nothing to decode, and is empty otherwise.
    """

    index: int
    key: str
    image: bytes
    uri: str
    offset: int
    label: str | None = None
    problem: str = ""


def media_suffixes(videos: bool) -> tuple[str, ...]:
    """Return the suffixes of image files, or of video files."""
    return VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders has a name that starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def open_shard(shard: Shard, prefetch: bool = False) -> BinaryIO:
    """Open a tar or Parquet file in the version that was listed.

    A shard's digest identifies that version, so no other is read. A file that a stage wrote has no version, because
    its name is the digest of its content.

    Args:
        shard: A tar or a Parquet file.
        prefetch: Whether a thread fetches the next READ_CHUNK_BYTES during sequential reading.

    Raises:
        FileNotFoundError: The object is gone.
        SemiscaleError: The object has changed since it was listed.
    """
    return storage.open_object(shard.uri, shard.version, prefetch=prefetch)


def is_too_large(name: str, size_bytes: int) -> bool:
    """Return whether a file is too large to be an image or a label.

    Reading it could take all memory of a pod.
    """
    return size_bytes > MAX_IMAGE_BYTES and name.lower().endswith((*IMAGE_SUFFIXES, *LABEL_SUFFIXES))


def parse_label(value: object) -> str | None:
    """Return a label as text, or None.

    A label is a name or a whole number. pandas makes a column of whole numbers a float one if some are missing.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, str | int) else None
