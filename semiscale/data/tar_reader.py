"""Read the samples of a WebDataset tar in stored order, without extracting it."""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple, Self

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data.shard import (
    LABEL_SUFFIXES,
    TOO_LARGE,
    Sample,
    SampleFields,
    Shard,
    is_hidden,
    is_too_large,
    media_suffixes,
    open_shard,
    parse_label,
)

# tarfile reads a long name or extended attributes as a whole.
_MAX_HEADER_BYTES = 1 << 20

# The header of a plain file in POSIX ustar: an ASCII name that ends in its field, size and checksum in octal, kind 0,
# and no prefix of the name. Almost all headers are of this form.
_PLAIN_HEADER = re.compile(rb"(?=[ -~]{1,99}\0).{124}([0-7]{11})[\0 ].{12}([0-7]{6})[\0 ]{2}0.{188}\0.{166}", re.DOTALL)

# Bytes that are checked after the last member. tar pads a file with zeros to 10 KiB.
_TAR_TAIL_BYTES = 1 << 16


class _Member(NamedTuple):
    """One file of a sample in a tar."""

    suffix: str
    data: bytes
    offset: int
    problem: str


def iter_tar_samples(shard: Shard, columns: SampleFields, prefetch: bool = False) -> Iterator[Sample]:
    """Yield the samples of a tar by the rule of WebDataset, in stored order.

    Neighbours that share the path up to the first dot of the file name are one sample. A name that starts with a dot
    belongs to no sample. See https://github.com/webdataset/webdataset.

    Args:
        shard: A tar.
        columns: The key of the label in .json members, and whether samples are videos.
        prefetch: Whether a thread fetches the next READ_CHUNK_BYTES meanwhile.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The file is not a tar.
        SemiscaleError: The tar is damaged, or has changed since it was listed.

    Cost:
        Memory for one sample.
    """
    with open_shard(shard, prefetch) as file, _open_tar(file, shard) as tar:
        try:
            members = (member for member in _members(tar) if not member.isdir() and not is_hidden(member.name))
            for index, (key, group) in enumerate(groupby(members, key=lambda member: _split_name(member.name)[0])):
                yield _tar_sample(index, key, _extract_sample(tar, group, shard, columns), shard, columns)
        # tarfile trusts the size in a header, so a damaged one can ask for more memory than there is.
        except (tarfile.TarError, MemoryError, OverflowError) as error:
            reason = str(error) or "a header has an impossible size"
            raise SemiscaleError("SEMI-E054", f"{shard.uri}: The tar is damaged: {reason}. Write it again.") from None
        _check_tar_complete(file, tar.offset, shard)


def _open_tar(file: BinaryIO, shard: Shard) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace", tarinfo=_Header)
    except tarfile.ReadError as error:
        raise InvalidInputError(
            "SEMI-E053", f"{shard.uri}: This is not a tar file: {error}. Write it again as a tar."
        ) from None


# Types of headers that extend the next one: long names of GNU, extended headers of POSIX and Solaris.
_EXTENDING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Header(tarfile.TarInfo):
    """The name, kind and size of a member.

    A plain header is parsed in a quarter of the time of tarfile. tarfile parses any other header, so that long names,
    links, sparse files, large sizes and damage have one behaviour.
    """

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
        # tarfile keeps every header. Python 3.13 has stream=True against it.
        tar.members.clear()  # type: ignore[attr-defined]


def _check_tar_complete(file: BinaryIO, offset: int, shard: Shard) -> None:
    """Raise SemiscaleError if reading stopped before the end of a tar.

    tarfile takes a truncated or damaged header for the end, which would silently lose the rest. A complete tar ends
    with at least one block of zeros.
    """
    file.seek(offset)
    rest = file.read(_TAR_TAIL_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        raise SemiscaleError(
            "SEMI-E054", f"{shard.uri}: The tar is damaged: cut off at byte {offset + len(rest)}. Write it again."
        )
    if rest.count(0) < len(rest):
        reason = "another tar appended"
        if any(rest[: tarfile.BLOCKSIZE]):
            reason = f"a damaged header, or {reason}"
        raise SemiscaleError(
            "SEMI-E054", f"{shard.uri}: The tar is damaged: {reason} at byte {offset}. Write it again."
        )


def _extract_sample(
    tar: tarfile.TarFile, group: Iterable[tarfile.TarInfo], shard: Shard, columns: SampleFields
) -> list[_Member]:
    """Read the members of one sample, with the data of the first member of each kind only.

    A sample with several images is not used. If all names of a tar are equal up to their first dot, the whole tar is
    one sample and must not be held in memory.
    """
    suffixes, kinds_read, members = media_suffixes(columns.videos), set(), []
    for member in group:
        suffix = _split_name(member.name)[1]
        # 2 is an image such as `.jpg`, 1 a derived image such as `.mask.png`, and 0 any other file.
        kind = (suffix in suffixes) + suffix.endswith(suffixes)
        members.append(
            _Member(suffix, b"", -1, "") if kind in kinds_read else _extract_member(tar, member, suffix, shard, columns)
        )
        kinds_read |= {kind} - {0}
    return members


def _extract_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, shard: Shard, columns: SampleFields
) -> _Member:
    if not suffix.endswith((*media_suffixes(columns.videos), *LABEL_SUFFIXES)):
        return _Member(suffix, b"", -1, "")
    if not member.isreg() or member.issparse():
        return _Member(suffix, b"", -1, "not a plain file")
    if shard.size_bytes and member.offset_data + member.size > shard.size_bytes:
        raise tarfile.ReadError(f"{member.name} at byte {member.offset} is larger than the file")
    if is_too_large(suffix, member.size):
        return _Member(suffix, b"", -1, TOO_LARGE)
    tar.fileobj.seek(member.offset_data)
    data = tar.fileobj.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return _Member(suffix, data, member.offset_data, "" if data else "empty file")


def _tar_sample(index: int, key: str, members: list[_Member], shard: Shard, columns: SampleFields) -> Sample:
    label_files = (member for suffix in LABEL_SUFFIXES for member in members if member.suffix.endswith(suffix))
    label = next(filter(None, (_parse_label_file(member, columns) for member in label_files)), None)
    suffixes = media_suffixes(columns.videos)
    images = [member for member in members if member.suffix.endswith(suffixes)]
    # An image such as a.jpg goes before the derived a.mask.png.
    images = [member for member in images if member.suffix in suffixes] or images
    if len(images) != 1:
        medium = "video" if columns.videos else "image"
        return Sample(index, key, b"", shard.uri, -1, label, f"{'several' if images else 'no'} {medium} members")
    return Sample(index, key, images[0].data, shard.uri, images[0].offset, label, images[0].problem)


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _parse_label_file(member: _Member, columns: SampleFields) -> str | None:
    text = member.data.decode("utf-8-sig", "replace")
    if not member.suffix.endswith(".json"):
        return parse_label(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parse_label(content.get(columns.label) if isinstance(content, dict) else content)
