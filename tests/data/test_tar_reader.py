"""Test the tar reader: keys, labels, offsets, and the refusal of damaged tars."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing, reader, shard, tar_reader
from semiscale.data.shard import SampleFields
from tests.support.shard_files import Member, make_image, make_tar, read_samples, read_tar, summarize, trace_memory


def parse_header(kind: type[tarfile.TarInfo], header: bytes) -> tuple[str, int, bytes] | type[Exception]:
    """Parse a header and return the fields that a reader needs.

    An error is returned as its class.
    """
    try:
        member = kind.frombuf(header, "utf-8", "replace")
    except (tarfile.HeaderError, ValueError) as error:
        return type(error)
    return member.name, member.size, member.type


@pytest.mark.parametrize(
    ("suffix", "format", "label_member"),
    [
        ("jpg", "JPEG", ("cls", b"3")),
        ("jpeg", "JPEG", ("cls", b" 3\n")),
        ("png", "PNG", ("json", json.dumps({"label": 3, "caption": "three"}).encode())),
        ("webp", "WEBP", ("txt", b"3")),
        ("JPG", "JPEG", ("CLS", b"3")),
        ("jpg", "JPEG", ("json", b"3")),
    ],
)
def test_a_sample_has_its_image_and_its_label(tmp_path: Path, suffix: str, format: str, label_member: Member) -> None:
    members = [
        (f"{number:04}.{name}", data)
        for number in range(3)
        for name, data in ((suffix, make_image(number, format)), label_member)
    ]
    samples = read_tar(tmp_path, members)
    assert summarize(samples) == [("0000", "3", ""), ("0001", "3", ""), ("0002", "3", "")]
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert [sample.image for sample in samples] == [make_image(number, format) for number in range(3)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_bytes_at_an_offset_are_the_image(bucket: str, format: int) -> None:
    # Two of the formats store long and non-ASCII names in extra headers. The offsets must skip them.
    long = "" if format == tarfile.USTAR_FORMAT else "é" * 120
    uri = storage.join(bucket, "a.tar")
    storage.write_bytes(
        uri, make_tar([(f"{long}{n}.{s}", make_image(n)) for n in range(5) for s in ("cls", "jpg")], format)
    )
    samples = read_samples(uri)
    assert len(samples) == 5
    for sample in samples:
        assert sample.uri == uri
        assert (
            reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image))
            == sample.image
            == make_image(sample.index)
        )


def test_a_key_ends_at_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("a.b")
    folder.type = tarfile.DIRTYPE
    members: list[Member | tarfile.TarInfo] = [
        folder,
        ("a.b/c.d.jpg", make_image(0)),
        ("a.b/c.d.cls", b"1"),
        ("./e/f/g.jpg", make_image(1)),
        ("e/g.jpg", b"x"),
    ]
    assert summarize(read_tar(tmp_path, members)) == [("a.b/c", "1", ""), ("e/f/g", None, ""), ("e/g", None, "")]


def test_a_label_can_be_a_class_name(tmp_path: Path) -> None:
    members = [("0.jpg", make_image(0)), ("0.cls", "\ufeffgolden retriever\n".encode())]
    assert summarize(read_tar(tmp_path, members)) == [("0", "golden retriever", "")]


def test_cls_precedes_json_and_json_precedes_txt(tmp_path: Path) -> None:
    # img2dataset writes the caption to .txt and the metadata to .json, with or without a label.
    members = [
        *[("0.jpg", make_image(0)), ("0.txt", b"a caption"), ("0.json", b'{"label": 7}')],
        *[("1.jpg", make_image(1)), ("1.json", b'{"label": 7}'), ("1.cls", b"5")],
        *[("2.jpg", make_image(2)), ("2.cls", b"5"), ("2.json", b'{"url": "x"}')],
        *[("3.jpg", make_image(3)), ("3.json", b'{"url": "x"}'), ("3.txt", b"name")],
    ]
    assert [sample.label for sample in read_tar(tmp_path, members)] == ["7", "5", "5", "name"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"label": null}', b'{"label": [1, 2]}', b"[1]", b"[" * 100_000])
def test_a_json_without_a_usable_label_gives_no_label(tmp_path: Path, content: bytes) -> None:
    assert summarize(read_tar(tmp_path, [("0.jpg", make_image(0)), ("0.json", content)])) == [("0", None, "")]


def test_the_label_can_be_another_key_of_the_json(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("0.jpg", make_image(0)), ("0.json", b'{"label": 1, "class": "cat"}')]))
    assert [sample.label for sample in read_samples(str(tmp_path), SampleFields(label="class"))] == ["cat"]


def test_members_apart_from_their_sample_are_counted(tmp_path: Path) -> None:
    members = [("0.jpg", make_image(0)), ("1.jpg", make_image(1)), ("0.cls", b"5"), ("1.cls", b"6")]
    expected = [("0", None, ""), ("1", None, ""), ("0", "5", "no image members"), ("1", "6", "no image members")]
    assert summarize(read_tar(tmp_path, members)) == expected


def test_missing_and_empty_images_are_counted(tmp_path: Path) -> None:
    members = [("0.cls", b"5"), ("1.jpg", b""), ("1.cls", b"5"), ("README", b"read me")]
    expected = [("0", "5", "no image members"), ("1", "5", "empty file"), ("README", None, "no image members")]
    assert summarize(read_tar(tmp_path, members)) == expected


def test_a_mask_is_not_taken_for_the_image(tmp_path: Path) -> None:
    (sample,) = read_tar(tmp_path, [("0.jpg", make_image(0)), ("0.mask.png", make_image(1, "PNG"))])
    assert (sample.image, sample.problem) == (make_image(0), "")


def test_a_key_with_several_images_is_counted(tmp_path: Path) -> None:
    # People name photographs like this. By WebDataset's rule, an image would silently replace another of its key.
    members = [
        ("trip.2020.jpg", make_image(0)),
        ("trip.2021.jpg", make_image(1)),
        ("0.jpg", make_image(0)),
        ("0.png", make_image(0)),
    ]
    expected = [("trip", None, "several image members"), ("0", None, "several image members")]
    assert summarize(read_tar(tmp_path, members)) == expected


def test_a_link_is_counted(tmp_path: Path) -> None:
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
    members: list[Member | tarfile.TarInfo] = [("0.jpg", make_image(0)), link]
    assert summarize(read_tar(tmp_path, members)) == [("0", None, ""), ("1", None, "not a plain file")]


def test_files_that_macos_adds_are_ignored(tmp_path: Path) -> None:
    members = [
        ("a/._0.jpg", b"x"),
        ("a/0.jpg", make_image(0)),
        ("a/._0.cls", b"x"),
        ("a/0.cls", b"1"),
        (".DS_Store", b""),
    ]
    assert summarize(read_tar(tmp_path, members)) == [("a/0", "1", "")]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    data = make_tar([("XX.jpg", make_image(0))])
    header = bytearray(data[:512].replace(b"XX", b"\xff\xfe", 1))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + data[512:])
    (sample,) = read_samples(str(tmp_path))
    assert sample.key.encode(), "the key must be valid UTF-8 for a Parquet file"
    assert sample.image == make_image(0)


def test_a_tar_without_members_has_no_samples(tmp_path: Path) -> None:
    assert read_tar(tmp_path, []) == []


@pytest.mark.parametrize("data", [b"", b"text", b"text" * 1000, make_image(0) + b"\0" * 512, b"\x1f\x8b" * 512])
def test_a_file_that_is_not_a_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InvalidInputError, match=rf"^{tmp_path}/a.tar: .*SEMI-E053"):
        read_samples(str(tmp_path))


def test_a_header_is_parsed_or_refused_as_tarfile_does() -> None:
    # The members are plain and odd. Every byte of their headers is changed, with and without a corrected checksum.
    long, large, link = tarfile.TarInfo("f" * 90 + "/a.jpg"), tarfile.TarInfo("b.jpg"), tarfile.TarInfo("c.jpg")
    large.size, link.type = (1 << 33) - 1, tarfile.SYMTYPE
    for member in (long, large, link, tarfile.TarInfo("d.jpg")):
        for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
            header = member.tobuf(format)[-512:]
            assert parse_header(tar_reader._Header, header) == parse_header(tarfile.TarInfo, header)
            for position in range(512):
                damaged = header[:position] + bytes([header[position] ^ (1 << position % 8)]) + header[position + 1 :]
                assert parse_header(tar_reader._Header, damaged) == parse_header(tarfile.TarInfo, damaged), position
                blank = damaged[:148] + b" " * 8 + damaged[156:]
                valid = damaged[:148] + b"%06o\0 " % sum(blank) + damaged[156:]
                if isinstance(known := parse_header(tarfile.TarInfo, valid), tuple):
                    assert parse_header(tar_reader._Header, valid) == known, position


def test_a_tar_truncated_anywhere_is_damaged(tmp_path: Path) -> None:
    # Between two members and within a header, tarfile ends without an error.
    data = make_tar([(f"{number}.jpg", make_image(number)) for number in range(3)])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset for member in archive]
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    lengths = [length for start in starts[1:] for length in (start - 300, start, start + 100, start + 512)]
    for length in [*lengths, end, end + 511]:
        (tmp_path / "a.tar").write_bytes(data[:length])
        with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.tar: [^\n]*\[SEMI-E054\]$") as error:
            read_samples(str(tmp_path))
        assert not isinstance(error.value, InvalidInputError)
    (tmp_path / "a.tar").write_bytes(data[: end + 512])
    assert len(read_samples(str(tmp_path))) == 3, "a single block of zeros marks the end"


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(make_tar([("0.jpg", make_image(0)), ("1.jpg", make_image(1)), ("2.jpg", make_image(2))]))
    second = data.index(b"1.jpg")
    data[second + 20] = 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(SemiscaleError, match=f"damaged header, or another tar appended at byte {second}"):
        read_samples(str(tmp_path))


def test_a_member_above_the_limit_of_an_image_is_counted_unread(tmp_path: Path) -> None:
    large, size_bytes = tarfile.TarInfo("1.jpg"), shard.MAX_IMAGE_BYTES + 512
    large.size = size_bytes
    # The seek leaves a hole in the file, which takes no space on the disk.
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(make_tar([("0.jpg", make_image(0))])[:1536] + large.tobuf(tarfile.USTAR_FORMAT))
        file.seek(size_bytes, io.SEEK_CUR)
        file.write(make_tar([("2.jpg", make_image(2))]))
    assert summarize(read_samples(str(tmp_path))) == [("0", None, ""), ("1", None, "more than 1 GiB"), ("2", None, "")]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_states_a_huge_size_is_damaged(tmp_path: Path, kind: bytes) -> None:
    huge = tarfile.TarInfo("1.jpg")
    huge.size, huge.type = 1 << 62, kind
    header = huge.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(make_tar([("0.jpg", make_image(0))])[:1536] + header + bytes(1024))
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.tar: [^\n]*\[SEMI-E054\]$"):
        read_samples(str(tmp_path))


def test_concatenated_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("0.jpg", make_image(0))]) + make_tar([("1.jpg", make_image(1))]))
    with pytest.raises(SemiscaleError, match="another tar appended at byte"):
        read_samples(str(tmp_path))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("before", [0, 1])
def test_a_tar_with_a_name_of_megabytes_is_damaged(tmp_path: Path, format: int, before: int) -> None:
    long = "x" * 1_100_000 + ".jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as file:
        for name in [f"{number}.jpg" for number in range(before)] + [long]:
            member = tarfile.TarInfo(name)
            member.size = len(make_image(0))
            file.addfile(member, io.BytesIO(make_image(0)))
    (shard,) = listing.list_shards([str(tmp_path)])
    with pytest.raises(SemiscaleError, match=r"a header of 1,100,\d\d\d bytes") as refusal:
        list(reader.iter_samples(shard, SampleFields()))
    assert len(str(refusal.value)) < 500


def test_a_tar_of_a_single_key_is_read_in_the_memory_of_a_few_images(tmp_path: Path) -> None:
    names = [f"www.example.com_{number}.jpg" for number in range(20)]
    (tmp_path / "a.tar").write_bytes(make_tar([(name, bytes(1 << 20)) for name in names]))
    (shard,) = listing.list_shards([str(tmp_path)])
    with trace_memory() as peak_bytes:
        samples = list(reader.iter_samples(shard, SampleFields()))
        assert peak_bytes() < 4 << 20
    assert [(sample.key, sample.problem) for sample in samples] == [("www", "several image members")]
