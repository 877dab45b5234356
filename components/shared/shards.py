"""Shards: finding the images, or the videos, under a URI and reading them one by one.

A shard is the unit of scanning, used in place: a WebDataset tar, a Parquet file, or a slice of a prefix of loose files.
Whatever the kind, `read` yields the same samples in the same order, so that (shard, index) names an image for good.
"""

import fnmatch
import hashlib
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, count, groupby, islice, pairwise
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from components.shared import storage
from components.shared.ahead import in_order
from components.shared.errors import Refused, SemiscaleError
from components.shared.stores.store import READ_CHUNK_BYTES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv", ".webm")
LABEL_SUFFIXES = (".cls", ".json", ".txt")  # in this order, where a sample has several
CONTAINER_SUFFIXES = (".tar", ".parquet")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FILES_PER_SHARD = 1024  # loose files to a shard, on average: a few seconds of scanning
MOST_FILES = 4 * FILES_PER_SHARD  # to a shard; one in fifty is so long
FILES_AHEAD = 32  # loose or linked files read at once: hides 30 ms of latency from a thousand images a second
MOST_VIDEOS_AHEAD = 4  # that a Parquet file links: how large they are is not known
BYTES_AHEAD = 64 << 20  # of loose files read at once, about: videos are few at a time
ROWS_PER_READ = 256  # of a Parquet file: what is Python objects at a time
MAX_GROUP_BYTES = 256 << 20  # of a Parquet file's row group that is fetched whole; a larger one comes page by page
MAX_ROWS = 1 << 20  # of a Parquet file to a shard, but for one row group: ten minutes of a GPU's scanning
MANY_ROWS_BYTES = 16 << 20  # a smaller Parquet file is not asked for its rows: at five bytes a name, three million
MAX_IMAGE_BYTES = 1 << 30  # half more than the pixels of any image that is decoded, at 16 bits and with alpha
_TOO_LARGE = "more than 1 GiB"
_MAX_HEADER_BYTES = 1 << 20  # of what tarfile reads whole: a long name, extended attributes
_PROBED_SAMPLES = 16  # of a tar, to learn how large they are
# The header of a file as almost all tars have it (POSIX ustar): an ASCII name that ends in its field, size and checksum
# in octal, kind 0, no prefix that goes before the name.
_PLAIN_HEADER = re.compile(rb"(?=[ -~]{1,99}\0).{124}([0-7]{11})[\0 ].{12}([0-7]{6})[\0 ]{2}0.{188}\0.{166}", re.DOTALL)
_REMOTE = re.compile("(gs|s3)://[A-Za-z0-9._-]{3,222}/.")
_ARE_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_ARE_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_TAR_TAIL_BYTES = 1 << 16  # looked at behind a tar's last member: tar pads with zeros to 10 KiB


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


class Unit(BaseModel):
    """A group of shards whose scores are ranked in one file and merged as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    shards: list[Shard]


@dataclass(frozen=True)
class Columns:
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


class _Member(NamedTuple):
    """One file of a sample in a tar."""

    suffix: str
    data: bytes
    offset: int
    problem: str


def loose_suffixes(videos: bool) -> tuple[str, ...]:
    """Return what the names of images end in, or of videos."""
    return VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES


def find(uris: Iterable[str], videos: bool = False) -> list[Shard]:
    """List the shards under URIs, in order. Raises Refused for a URI that holds no tar, Parquet, image or video file.

    What is hidden, a name or a folder that starts with a dot, is left out: it is what macOS and Jupyter leave behind.
    No two shards have one name: where URIs hold equal ones, the later is prefixed with its URI's last folder or number.
    A tar or Parquet file that lies below two of the URIs is one shard, by its first name.
    """
    found: dict[str, Shard] = {}
    containers: dict[str, Shard] = {}
    listed = []
    for number, uri in enumerate(uris, 1):
        for shard in _find_one(uri, loose_suffixes(videos)):
            listed.append(containers.get(shard.uri) or _told_apart(shard, uri, number, found))
            found[listed[-1].name] = listed[-1]
            if not shard.files:
                containers[shard.uri] = listed[-1]
    return listed


def _told_apart(shard: Shard, uri: str, number: int, found: Mapping[str, Shard]) -> Shard:
    """Name a shard as no other is, by what survives a move of the bucket; the same shard again keeps its name."""
    named, prefixes = shard, _prefixes(uri, number)
    while found.get(named.name, named) != named:
        prefix = next(prefixes)
        named = shard.model_copy(update={"name": f"{prefix}/{shard.name}", "prefix": prefix})
    return named


def _prefixes(uri: str, number: int) -> Iterator[str]:
    """Yield the last folder of a URI, if it has any below the bucket, and then with numbers: `b`, `b-2`, `b-3` …"""
    path = _pattern(storage.absolute(uri))[0].rpartition("://")[2]
    folder = path.rpartition("/")[2] if "/" in path else ""
    if folder:
        yield folder
    for tried in count(number):
        yield f"{folder}-{tried}" if folder else str(tried)


def read(shard: Shard, columns: Columns, ahead: bool = False) -> Iterator[Sample]:
    """Yield a shard's samples in their stored order, streaming.

    Memory: one sample of a tar or of loose files; of a Parquet file three times a row group of up to MAX_GROUP_BYTES,
    of a larger one a few of its pages, of about a thousand images each as most programs write them. With `ahead`,
    threads fetch what comes next: READ_CHUNK_BYTES more of a tar, FILES_AHEAD files of up to BYTES_AHEAD together,
    MOST_VIDEOS_AHEAD linked videos.

    Raises FileNotFoundError where the shard is gone, Refused where it is of another format, SemiscaleError where it is
    damaged or is not what was listed any more; of loose files, where one of them is gone or another. An image that a
    Parquet file names by its URI is taken as it is: the shard's digest vouches for the names only.
    """
    if shard.kind == "tar":
        return _read_tar(shard, columns, ahead)
    if shard.kind == "parquet":
        return _read_parquet(shard, columns, ahead)
    return _read_files(shard, ahead)


def slices(shard: Shard) -> list[Shard]:
    """Cut a Parquet file of many rows between its row groups, so that no pod holds more than MAX_ROWS or one group of
    it, and several share it; any other shard is its only slice. Reads the footer. Raises what `read` raises.

    Each has its part of the bytes, by its rows.
    """
    if shard.kind != "parquet" or shard.size_bytes < MANY_ROWS_BYTES:
        return [shard]
    with _open(shard) as file:
        metadata = _open_parquet(file, shard).metadata
    cuts = [0]
    for end, with_next in pairwise(_group_ends(metadata)):
        if with_next - cuts[-1] > MAX_ROWS and end > cuts[-1]:
            cuts.append(end)
    ends = [*cuts[1:], metadata.num_rows]
    return [_rows_of(shard, *rows, of=ends[-1]) for rows in zip(cuts, ends, strict=True)] if cuts[1:] else [shard]


def _group_ends(metadata: pq.FileMetaData) -> list[int]:
    return list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))


def _rows_of(shard: Shard, start: int, end: int, of: int) -> Shard:
    size_bytes = shard.size_bytes * end // of - shard.size_bytes * start // of
    name = f"{shard.name} from row {start}"
    return shard.model_copy(update={"name": name, "size_bytes": size_bytes, "rows": (start, end)})


def pick(shard: Shard, indexes: Collection[int], columns: Columns) -> Iterator[Sample]:
    """Yield some samples of a Parquet file, in order; of its row groups, only those that hold one are read.

    Memory: as `read`. Raises what `read` raises.
    """
    wanted = set(indexes)
    with _open(shard) as file:
        table = _open_parquet(file, shard)
        _refuse_columns(table.schema_arrow, columns, shard)
        for group, start, end in _groups(table, shard):
            if wanted.isdisjoint(range(start, end)):
                continue
            for index, row in enumerate(_rows(table, columns, shard, [group]), start):
                if index in wanted:
                    yield _parquet_sample(index, row, shard, columns)


def read_bytes(uri: str, offset: int, size_bytes: int) -> bytes:
    """Read one image of a tar or a loose file by its place."""
    return storage.read(uri, offset, size_bytes)


def estimated_images(shard: Shard, columns: Columns) -> float:
    """Estimate how many images a shard has: from its listing, from a Parquet file's footer, from a tar's first ones.

    Raises what `read` raises.
    """
    if shard.kind == "files":
        return len(shard.files)
    if shard.kind == "parquet":
        with _open(shard) as file:
            table = _open_parquet(file, shard)
            _refuse_columns(table.schema_arrow, columns, shard)
            return max((end for _, _, end in _groups(table, shard)), default=0)
    first = list(islice(_read_tar(shard, columns), _PROBED_SAMPLES))
    end = max((sample.offset + len(sample.image) for sample in first), default=0)
    return len(first) * shard.size_bytes / max(end, 1)


def _find_one(uri: str, suffixes: tuple[str, ...]) -> list[Shard]:
    if not uri.strip():
        raise Refused("empty URI; expected a folder, a .tar or a .parquet file")
    root, pattern = _pattern(storage.absolute(uri))
    named = [(_below(entry.uri, root), entry) for entry in storage.entries(root)]
    shown = [(name, entry) for name, entry in named if not _hidden(name) and fnmatch.fnmatchcase(name, pattern)]
    _refuse_compressed(root, [name for name, _ in shown])
    containers = [_container(name, entry) for name, entry in shown if name.lower().endswith(CONTAINER_SUFFIXES)]
    files = [_loose_file(name, entry) for name, entry in shown if name.lower().endswith(suffixes)]
    slices = [_slice(root, part) for part in _cut(files)]
    if not containers and not slices:
        what = f"{len(named)} files, none of them usable" if named else "nothing here"
        expected = ", ".join((*CONTAINER_SUFFIXES, *suffixes))
        raise Refused(f"{uri}: {what}; expected {expected} files; check the URI")
    return [*containers, *slices]


def _pattern(uri: str) -> tuple[str, str]:
    """Split `folder/part-*.tar` into the folder and the pattern of its names; any other URI stands for all below it."""
    folder, _, last = uri.rpartition("/")
    return (folder, last) if "*" in last else (uri, "*")


def _refuse_compressed(root: str, names: list[str]) -> None:
    for name in names:
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            raise Refused(f"{root}: {name} is a compressed tar, whose images cannot be read one by one; decompress it")


def _container(name: str, entry: storage.Entry) -> Shard:
    kind: Literal["tar", "parquet"] = "tar" if name.lower().endswith(".tar") else "parquet"
    return Shard(uri=entry.uri, name=name, kind=kind, size_bytes=entry.size_bytes, version=entry.version)


def _loose_file(name: str, entry: storage.Entry) -> LooseFile:
    return LooseFile(uri=entry.uri, name=name, size_bytes=entry.size_bytes, version=entry.version)


def _cut(files: list[LooseFile]) -> list[list[LooseFile]]:
    """Cut files where a hash of a name says so, so that a file that is added or removed changes its own slice alone.

    At most MOST_FILES are together: what follows such a cut moves up to the next name that says so.
    """
    slices: list[list[LooseFile]] = []
    for file in files:
        if not slices or len(slices[-1]) == MOST_FILES or _begins_a_slice(file.name):
            slices.append([])
        slices[-1].append(file)
    return slices


def _begins_a_slice(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % FILES_PER_SHARD == 0


def _slice(root: str, files: list[LooseFile]) -> Shard:
    """Name a slice by its first file: the same name, and so the same order of ties, whatever happens to the others."""
    size = sum(file.size_bytes for file in files)
    name = f"files from {files[0].name}"
    return Shard(uri=root, name=name, kind="files", size_bytes=size, version="", files=files)


def _below(uri: str, root: str) -> str:
    return uri.removeprefix(root).lstrip("/") or PurePosixPath(uri).name


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _open(shard: Shard, ahead: bool = False) -> BinaryIO:
    """Open a tar or Parquet file. A digest vouches for the version that was listed, so another one is not read;
    what a stage wrote itself is listed without a version: its name is the digest of what it holds."""
    return storage.open_read(shard.uri, shard.version, ahead=ahead)


def _read_tar(shard: Shard, columns: Columns, ahead: bool = False) -> Iterator[Sample]:
    """WebDataset's rule: neighbours that share the path up to the first dot of the file name are one sample.

    https://github.com/webdataset/webdataset: names that start with a dot belong to none.
    """
    with _open(shard, ahead) as file, _open_tar(file, shard) as tar:
        try:
            members = (member for member in _members(tar) if not member.isdir() and not _hidden(member.name))
            for index, (key, group) in enumerate(groupby(members, key=lambda member: _split_name(member.name)[0])):
                yield _tar_sample(index, key, _extracted(tar, group, shard, columns), shard, columns)
        except (tarfile.TarError, MemoryError, OverflowError) as error:  # what a header says of its size is believed
            why = str(error) or "a header of a size that cannot be"
            raise SemiscaleError(f"{shard.uri}: damaged tar: {why}; write it again") from None
        _refuse_early_end(file, tar.offset, shard)


def _open_tar(file: BinaryIO, shard: Shard) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace", tarinfo=_Header)
    except tarfile.ReadError as error:
        raise Refused(f"{shard.uri}: not a tar file: {error}") from None


# What says more of the member that follows: GNU's long names, POSIX's extended headers, Solaris'.
_EXTENDING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Header(tarfile.TarInfo):
    """A member's name, kind and size. A plain header is read in a quarter of tarfile's time, any other by tarfile, so
    that there is one behaviour: long names, links, sparse files, large sizes, damage."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        plain = _PLAIN_HEADER.fullmatch(buf)
        if not plain or int(plain[2], 8) != sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
            header = super().frombuf(buf, encoding, errors)
            if header.type in _EXTENDING and header.size > _MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a header of {header.size:,} bytes")
            return header
        header = cls(buf[: buf.index(0)].decode("ascii"))
        header.size = int(plain[1], 8)
        return header


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := tar.next():
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header; Python 3.13 has stream=True for this


def _refuse_early_end(file: BinaryIO, offset: int, shard: Shard) -> None:
    """Raise SemiscaleError where a tar's reading ended elsewhere than at its end.

    tarfile takes a header that is cut off or makes no sense for the end, which would lose the rest in silence. A tar
    ends in a block of zeros at least, which is also how one tells that none of it is missing.
    """
    file.seek(offset)
    rest = file.read(_TAR_TAIL_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        raise SemiscaleError(f"{shard.uri}: damaged tar: cut off at byte {offset + len(rest)}; write it again")
    if rest.count(0) < len(rest):
        what = "a damaged header, or another tar appended" if any(rest[: tarfile.BLOCKSIZE]) else "another tar appended"
        raise SemiscaleError(f"{shard.uri}: damaged tar: {what} at byte {offset}; write it again")


def _extracted(tar: tarfile.TarFile, group: Iterable[tarfile.TarInfo], shard: Shard, columns: Columns) -> list[_Member]:
    """Read the members of one sample. Of several images none is taken, so the first of each kind is read and no other:
    where all names of a tar share what stands before their first dot, all of it is one sample."""
    suffixes, had, members = loose_suffixes(columns.videos), set(), []
    for member in group:
        suffix = _split_name(member.name)[1]
        kind = (suffix in suffixes) + suffix.endswith(suffixes)
        members.append(_Member(suffix, b"", -1, "") if kind in had else _extract(tar, member, suffix, shard, columns))
        had |= {kind} - {0}
    return members


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, shard: Shard, columns: Columns) -> _Member:
    if not suffix.endswith((*loose_suffixes(columns.videos), *LABEL_SUFFIXES)):
        return _Member(suffix, b"", -1, "")
    if not member.isreg() or member.issparse():
        return _Member(suffix, b"", -1, "not a plain file")
    if shard.size_bytes and member.offset_data + member.size > shard.size_bytes:
        raise tarfile.ReadError(f"{member.name} at byte {member.offset} is larger than the file")
    if _too_large(suffix, member.size):
        return _Member(suffix, b"", -1, _TOO_LARGE)
    tar.fileobj.seek(member.offset_data)
    data = tar.fileobj.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return _Member(suffix, data, member.offset_data, "" if data else "empty file")


def _too_large(name: str, size_bytes: int) -> bool:
    """Say whether a file that is called an image is none by its size: a pod that read it would have no memory left."""
    return size_bytes > MAX_IMAGE_BYTES and name.lower().endswith((*IMAGE_SUFFIXES, *LABEL_SUFFIXES))


def _tar_sample(index: int, key: str, members: list[_Member], shard: Shard, columns: Columns) -> Sample:
    by_rank = (member for suffix in LABEL_SUFFIXES for member in members if member.suffix.endswith(suffix))
    label = next(filter(None, (_label(member, columns) for member in by_rank)), None)
    suffixes = loose_suffixes(columns.videos)
    images = [member for member in members if member.suffix.endswith(suffixes)]
    images = [member for member in images if member.suffix in suffixes] or images  # a.jpg before its a.mask.png
    if len(images) != 1:
        what = "video" if columns.videos else "image"
        return Sample(index, key, b"", shard.uri, -1, label, f"{'several' if images else 'no'} {what} members")
    return Sample(index, key, images[0].data, shard.uri, images[0].offset, label, images[0].problem)


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _label(member: _Member, columns: Columns) -> str | None:
    text = member.data.decode("utf-8-sig", "replace")
    if not member.suffix.endswith(".json"):
        return _as_label(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _as_label(content.get(columns.label) if isinstance(content, dict) else content)


def _as_label(value: object) -> str | None:
    """Write a label as text: a name or a whole number, which pandas makes a float where others are missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, str | int) else None


def _read_parquet(shard: Shard, columns: Columns, ahead: bool) -> Iterator[Sample]:
    with _open(shard) as file:
        table = _open_parquet(file, shard)
        _refuse_columns(table.schema_arrow, columns, shard)
        rows = enumerate(_rows(table, columns, shard, [group for group, _, _ in _groups(table, shard)]))
        at_once = MOST_VIDEOS_AHEAD if columns.videos else FILES_AHEAD
        if ahead and _may_hold_links(table.schema_arrow.field(columns.image).type):
            yield from in_order(lambda row: _parquet_sample(*row, shard, columns), rows, at_once)
        else:
            yield from (_parquet_sample(index, row, shard, columns) for index, row in rows)


def _open_parquet(file: BinaryIO, shard: Shard) -> pq.ParquetFile:
    """Open a Parquet file. pandas and others put all of a file's images into one row group, which may be gigabytes;
    small ones are fetched whole, because page by page each of their columns would cost a request of its own."""
    try:
        table = pq.ParquetFile(file)
        groups = list(map(table.metadata.row_group, range(table.num_row_groups)))
        if sum(group.num_rows for group in groups) != table.metadata.num_rows:
            raise pa.ArrowInvalid("its row groups have not the rows that its footer says")
        if max((group.total_byte_size for group in groups), default=0) <= MAX_GROUP_BYTES:
            return table
        return pq.ParquetFile(file, metadata=table.metadata, pre_buffer=False, buffer_size=READ_CHUNK_BYTES)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refused(f"{shard.uri}: not a Parquet file: {_first_line(error)}") from None


def _refuse_columns(schema: pa.Schema, columns: Columns, shard: Shard) -> None:
    for option, name in (("image_column", columns.image), ("label_column", columns.label)):
        if name and name not in schema.names:
            raise Refused(f"{shard.uri}: no column {name!r}; it has {', '.join(schema.names)}; set {option}")
    for name in (columns.image, columns.label, "key"):
        if schema.names.count(name) > 1:
            raise Refused(f"{shard.uri}: several columns {name!r}; expected one; write it again")
    kind = schema.field(columns.image).type
    if not _holds_images(kind):
        raise Refused(f"{shard.uri}: column {columns.image!r} holds {kind}; expected bytes, URIs or {{bytes, path}}")


def _holds_images(kind: pa.DataType) -> bool:
    """Say whether a column's type is bytes, a URI, or the {bytes, path} pair that Hugging Face datasets write."""
    if pa.types.is_struct(kind):
        pair = [field for field in kind if field.name in ("bytes", "path")]
        return bool(pair) and all(pa.types.is_null(field.type) or _holds_images(field.type) for field in pair)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (*_ARE_BYTES, *_ARE_TEXT))


def _may_hold_links(kind: pa.DataType) -> bool:
    return not any(test(kind) for test in _ARE_BYTES)


def _groups(table: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Yield the row groups of a shard, each with its first row and the one after its last, counted within it."""
    first, after = shard.rows or (0, table.metadata.num_rows)
    for group, (start, end) in enumerate(pairwise([0, *_group_ends(table.metadata)])):
        if first <= start and end <= after:
            yield group, start - first, end - first


def _rows(table: pq.ParquetFile, columns: Columns, shard: Shard, groups: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of some row groups."""
    wanted = [name for name in table.schema_arrow.names if name in (columns.image, columns.label, "key")]
    try:
        for batch in table.iter_batches(ROWS_PER_READ, row_groups=groups, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SemiscaleError(f"{shard.uri}: damaged Parquet file: {_first_line(error)}; write it again") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _parquet_sample(index: int, row: dict[str, Any], shard: Shard, columns: Columns) -> Sample:
    image, label = row[columns.image], _as_label(row.get(columns.label))
    key = row.get("key")
    if isinstance(key, bytes):
        key = key.decode("utf-8", "replace")
    key = str((shard.rows or (0, 0))[0] + index) if key is None else str(key)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        return _linked_sample(index, key, image, label, shard, columns.videos)
    return Sample(index, key, image or b"", shard.uri, -1, label, "" if image else "empty image")


def _linked_sample(index: int, key: str, link: str, label: str | None, shard: Shard, video: bool) -> Sample:
    """Read an image that a Parquet file names: by its URI, or by a path relative to the Parquet file's folder."""
    absolute = "://" in link or link.startswith("/")
    uri = link if absolute else storage.join(shard.uri.rpartition("/")[0], link)
    try:
        _refuse_no_name(uri)
        data, problem = _content(uri, None if video else MAX_IMAGE_BYTES)
    except (Refused, ValueError):
        data, problem = b"", "not a URI of gs://, s3:// or file://"
    return Sample(index, key, data, uri, 0, label, problem)


def _refuse_no_name(uri: str) -> None:
    """Raise Refused for what no object can be called: a store answers an error to it that does not tell it from others,
    https://cloud.google.com/storage/docs/objects#naming, .../buckets#naming; S3's rules are narrower."""
    if storage.is_remote(uri) and not (_REMOTE.match(uri) and len(uri.split("/", 3)[3].encode()) <= 1024):
        raise Refused(f"{uri}: no name of an object")


def _read_files(shard: Shard, ahead: bool) -> Iterator[Sample]:
    """A file's label is its folder's name; the unlabeled side does not look at it."""
    each = max(shard.size_bytes // max(len(shard.files), 1), 1)
    at_once = min(max(BYTES_AHEAD // each, 2), FILES_AHEAD)
    contents = in_order(_listed_content, shard.files, at_once) if ahead else map(_listed_content, shard.files)
    for index, (file, (data, problem)) in enumerate(zip(shard.files, contents, strict=True)):
        yield Sample(index, file.name, data, file.uri, 0, PurePosixPath(file.name).parent.name or None, problem)


def _listed_content(file: LooseFile) -> tuple[bytes, str]:
    """Read a file that the digest of its shard vouches for: no other than was listed. A link to nothing is counted."""
    if _too_large(file.name, file.size_bytes):
        return b"", _TOO_LARGE
    try:
        data = storage.read(file.uri, version=file.version)
    except FileNotFoundError:
        if not file.version:
            return b"", "missing file"
        raise SemiscaleError(f"{file.uri}: gone since it was listed; put it back, or run the plan again") from None
    return data, "" if data else "empty file"


def _content(uri: str, limit: int | None) -> tuple[bytes, str]:
    """Read a file of which nothing is known: of one that is too large, the bytes that tell."""
    try:
        data = storage.read(uri, 0, None if limit is None else limit + 1)
    except FileNotFoundError:
        return b"", "missing file"
    too_large = limit is not None and len(data) > limit
    return (b"", _TOO_LARGE) if too_large else (data, "" if data else "empty file")
