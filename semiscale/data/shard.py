"""Define shards, shard groups and samples, which all readers share."""

import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from semiscale import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv", ".webm")


LABEL_SUFFIXES = (".cls", ".json", ".txt")  # in this order, where a sample has several


CONTAINER_SUFFIXES = (".tar", ".parquet")


COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


MAX_IMAGE_BYTES = 1 << 30  # half more than the pixels of any image that is decoded, at 16 bits and with alpha


TOO_LARGE = "more than 1 GiB"


class LooseFile(BaseModel):
    """One file of a shard of loose files; `name` is its path below the prefix it was listed from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    name: str
    size_bytes: int
    version: str


class Shard(BaseModel):
    """One unit of scanning. `name` is relative to the URI it was listed from, so it survives a move of the bucket.

    `prefix` is what was put before the name because another shard has it (`find`). `rows` are, of a Parquet file, the
    first one and the one after the last, where they are not all (`slices`).
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
        """Return 16 hexadecimal digits that change when the shard's place or bytes do, or its name's prefix."""
        identity = [self.uri, self.version, *(f"{file.name}@{file.version}" for file in self.files)]
        identity += [self.prefix] if self.prefix else []
        identity += [str(self.rows)] if self.rows else []
        return hashlib.blake2b("\0".join(identity).encode(), digest_size=8).hexdigest()


class ShardGroup(BaseModel):
    """A group of shards whose scores are ranked in one file and merged as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    shards: list[Shard]


@dataclass(frozen=True)
class SampleFields:
    """What a Parquet file's columns, or a .json member's keys, are called; whether a sample is an image or a video."""

    image: str = "image"
    label: str = "label"
    videos: bool = False


@dataclass(frozen=True)
class Sample:
    """One image, or video, as stored.

    `offset` is where its bytes start in the object at `uri`, or -1 inside a Parquet file; `problem`
    says why there is no image to decode (an empty string where there is).
    """

    index: int
    key: str
    image: bytes
    uri: str
    offset: int
    label: str | None = None
    problem: str = ""


def media_suffixes(videos: bool) -> tuple[str, ...]:
    """Return what the names of images end in, or of videos."""
    return VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders has a name that starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def open_shard(shard: Shard, ahead: bool = False) -> BinaryIO:
    """Open a tar or Parquet file. A digest vouches for the version that was listed, so another one is not read;
    what a stage wrote itself is listed without a version: its name is the digest of what it holds.
    """
    return storage.open_object(shard.uri, shard.version, ahead=ahead)


def is_too_large(name: str, size_bytes: int) -> bool:
    """Say whether a file that is called an image is none by its size: a pod that read it would have no memory left."""
    return size_bytes > MAX_IMAGE_BYTES and name.lower().endswith((*IMAGE_SUFFIXES, *LABEL_SUFFIXES))


def parse_label(value: object) -> str | None:
    """Write a label as text: a name or a whole number, which pandas makes a float where others are missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, str | int) else None
