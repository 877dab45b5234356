"""Shards as users have them: tars, Parquet files and folders of images, whole and damaged, in every kind of store."""

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing, parquet_reader, reader, shard, tar_reader
from semiscale.data.shard import Sample, SampleFields, Shard
from tests.support import pictures

Member = tuple[str, bytes]


def image(number: int, format: str = "JPEG") -> bytes:
    """Return a small image of a colour of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 37 % 256, number * 91 % 256, 128)).save(buffer, format)
    return buffer.getvalue()


def tar(members: Iterable[Member | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of named bytes, or of members without any."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def read(uri: str, columns: SampleFields | None = None) -> list[Sample]:
    """Find what is under a URI and read all of it."""
    return [
        sample
        for shard in listing.list_shards([uri])
        for sample in reader.iter_samples(shard, columns or SampleFields(label=""))
    ]


@contextmanager
def traced_memory() -> Iterator[Callable[[], int]]:
    """Watch what Python allocates; the function that is yielded returns the most that it was."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header_of(kind: type[tarfile.TarInfo], header: bytes) -> tuple[str, int, bytes] | type[Exception]:
    """Read a header; return what a reader needs of it, or the kind of error."""
    try:
        member = kind.frombuf(header, "utf-8", "replace")
    except (tarfile.HeaderError, ValueError) as error:
        return type(error)
    return member.name, member.size, member.type


def read_tar(folder: Path, members: Iterable[Member | tarfile.TarInfo], **options: Any) -> list[Sample]:
    """Read a tar of these members, with labels."""
    (folder / "a.tar").write_bytes(tar(members, **options))
    return read(str(folder / "a.tar"), SampleFields())


def read_parquet(folder: Path, columns: dict[str, Any], named: SampleFields | None = None) -> list[Sample]:
    """Read a Parquet file of these columns, without labels unless their column is named."""
    (folder / "a.parquet").write_bytes(parquet(columns))
    return read(str(folder / "a.parquet"), named)


def brief(samples: list[Sample]) -> list[tuple[str, str | None, str]]:
    return [(sample.key, sample.label, sample.problem) for sample in samples]


class TestTar:
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
    def test_an_image_and_its_label(self, tmp_path: Path, suffix: str, format: str, label_member: Member) -> None:
        members = [
            (f"{number:04}.{name}", data)
            for number in range(3)
            for name, data in ((suffix, image(number, format)), label_member)
        ]
        samples = read_tar(tmp_path, members)
        assert brief(samples) == [("0000", "3", ""), ("0001", "3", ""), ("0002", "3", "")]
        assert [sample.index for sample in samples] == [0, 1, 2]
        assert [sample.image for sample in samples] == [image(number, format) for number in range(3)]

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_offsets_lead_to_the_image(self, bucket: str, format: int) -> None:
        # Long and non-ASCII names take extra headers in two of the formats, which the offsets have to pass over.
        long = "" if format == tarfile.USTAR_FORMAT else "é" * 120
        uri = storage.join(bucket, "a.tar")
        storage.write_bytes(uri, tar([(f"{long}{n}.{s}", image(n)) for n in range(5) for s in ("cls", "jpg")], format))
        samples = read(uri)
        assert len(samples) == 5
        for sample in samples:
            assert sample.uri == uri
            assert (
                reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image))
                == sample.image
                == image(sample.index)
            )

    def test_folders_and_dots(self, tmp_path: Path) -> None:
        folder = tarfile.TarInfo("a.b")
        folder.type = tarfile.DIRTYPE
        members: list[Member | tarfile.TarInfo] = [
            folder,
            ("a.b/c.d.jpg", image(0)),
            ("a.b/c.d.cls", b"1"),
            ("./e/f/g.jpg", image(1)),
            ("e/g.jpg", b"x"),
        ]
        assert brief(read_tar(tmp_path, members)) == [("a.b/c", "1", ""), ("e/f/g", None, ""), ("e/g", None, "")]

    def test_a_class_name_for_a_label(self, tmp_path: Path) -> None:
        members = [("0.jpg", image(0)), ("0.cls", "\ufeffgolden retriever\n".encode())]
        assert brief(read_tar(tmp_path, members)) == [("0", "golden retriever", "")]

    def test_which_label_counts(self, tmp_path: Path) -> None:
        # As img2dataset writes them: a caption in .txt, metadata in .json, which may have the label or not.
        members = [
            *[("0.jpg", image(0)), ("0.txt", b"a caption"), ("0.json", b'{"label": 7}')],
            *[("1.jpg", image(1)), ("1.json", b'{"label": 7}'), ("1.cls", b"5")],
            *[("2.jpg", image(2)), ("2.cls", b"5"), ("2.json", b'{"url": "x"}')],
            *[("3.jpg", image(3)), ("3.json", b'{"url": "x"}'), ("3.txt", b"name")],
        ]
        assert [sample.label for sample in read_tar(tmp_path, members)] == ["7", "5", "5", "name"]

    @pytest.mark.parametrize("content", [b"", b"{", b'{"label": null}', b'{"label": [1, 2]}', b"[1]", b"[" * 100_000])
    def test_a_label_that_is_none(self, tmp_path: Path, content: bytes) -> None:
        assert brief(read_tar(tmp_path, [("0.jpg", image(0)), ("0.json", content)])) == [("0", None, "")]

    def test_another_key_of_the_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(tar([("0.jpg", image(0)), ("0.json", b'{"label": 1, "class": "cat"}')]))
        assert [sample.label for sample in read(str(tmp_path), SampleFields(label="class"))] == ["cat"]

    def test_members_out_of_their_group_are_counted(self, tmp_path: Path) -> None:
        members = [("0.jpg", image(0)), ("1.jpg", image(1)), ("0.cls", b"5"), ("1.cls", b"6")]
        found = [("0", None, ""), ("1", None, ""), ("0", "5", "no image members"), ("1", "6", "no image members")]
        assert brief(read_tar(tmp_path, members)) == found

    def test_a_missing_and_an_empty_image(self, tmp_path: Path) -> None:
        members = [("0.cls", b"5"), ("1.jpg", b""), ("1.cls", b"5"), ("README", b"read me")]
        found = [("0", "5", "no image members"), ("1", "5", "empty file"), ("README", None, "no image members")]
        assert brief(read_tar(tmp_path, members)) == found

    def test_the_image_beside_its_mask(self, tmp_path: Path) -> None:
        (sample,) = read_tar(tmp_path, [("0.jpg", image(0)), ("0.mask.png", image(1, "PNG"))])
        assert (sample.image, sample.problem) == (image(0), "")

    def test_several_images_of_one_name_are_not_guessed_among(self, tmp_path: Path) -> None:
        # Not by WebDataset's rule, but how people name photographs: by it, one would replace the other in silence.
        members = [("trip.2020.jpg", image(0)), ("trip.2021.jpg", image(1)), ("0.jpg", image(0)), ("0.png", image(0))]
        found = [("trip", None, "several image members"), ("0", None, "several image members")]
        assert brief(read_tar(tmp_path, members)) == found

    def test_a_link_is_counted(self, tmp_path: Path) -> None:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        members: list[Member | tarfile.TarInfo] = [("0.jpg", image(0)), link]
        assert brief(read_tar(tmp_path, members)) == [("0", None, ""), ("1", None, "not a plain file")]

    def test_what_macos_adds_is_left_out(self, tmp_path: Path) -> None:
        members = [
            ("a/._0.jpg", b"x"),
            ("a/0.jpg", image(0)),
            ("a/._0.cls", b"x"),
            ("a/0.cls", b"1"),
            (".DS_Store", b""),
        ]
        assert brief(read_tar(tmp_path, members)) == [("a/0", "1", "")]

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        data = tar([("XX.jpg", image(0))])
        header = bytearray(data[:512].replace(b"XX", b"\xff\xfe", 1))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(bytes(header) + data[512:])
        (sample,) = read(str(tmp_path))
        assert sample.key.encode(), "it can be written to a Parquet file"
        assert sample.image == image(0)

    def test_a_tar_without_members(self, tmp_path: Path) -> None:
        assert read_tar(tmp_path, []) == []

    @pytest.mark.parametrize("data", [b"", b"text", b"text" * 1000, image(0) + b"\0" * 512, b"\x1f\x8b" * 512])
    def test_what_is_not_a_tar_is_refused(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(InvalidInputError, match=rf"^{tmp_path}/a.tar: .*SEMI-E053"):
            read(str(tmp_path))

    def test_a_header_is_read_as_tarfile_reads_it_or_is_refused_as_it_is(self) -> None:
        """Of plain and odd members, and of each with any one byte changed, its checksum made right or not."""
        long, large, link = tarfile.TarInfo("f" * 90 + "/a.jpg"), tarfile.TarInfo("b.jpg"), tarfile.TarInfo("c.jpg")
        large.size, link.type = (1 << 33) - 1, tarfile.SYMTYPE
        for member in (long, large, link, tarfile.TarInfo("d.jpg")):
            for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
                header = member.tobuf(format)[-512:]
                assert header_of(tar_reader._Header, header) == header_of(tarfile.TarInfo, header)
                for place in range(512):
                    damaged = header[:place] + bytes([header[place] ^ (1 << place % 8)]) + header[place + 1 :]
                    assert header_of(tar_reader._Header, damaged) == header_of(tarfile.TarInfo, damaged), place
                    blank = damaged[:148] + b" " * 8 + damaged[156:]
                    valid = damaged[:148] + b"%06o\0 " % sum(blank) + damaged[156:]
                    if isinstance(known := header_of(tarfile.TarInfo, valid), tuple):
                        assert header_of(tar_reader._Header, valid) == known, place

    def test_a_tar_cut_anywhere_is_damaged(self, tmp_path: Path) -> None:
        # Also between two members and in a header, where tarfile itself ends without a word.
        data = tar([(f"{number}.jpg", image(number)) for number in range(3)])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            starts = [member.offset for member in archive]
        end = data.rstrip(b"\0").__len__() // 512 * 512 + 512
        cuts = [cut for start in starts[1:] for cut in (start - 300, start, start + 100, start + 512)]
        for cut in [*cuts, end, end + 511]:
            (tmp_path / "a.tar").write_bytes(data[:cut])
            with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.tar: [^\n]*\[SEMI-E054\]$") as error:
                read(str(tmp_path))
            assert not isinstance(error.value, InvalidInputError)
        (tmp_path / "a.tar").write_bytes(data[: end + 512])
        assert len(read(str(tmp_path))) == 3, "one block of zeros is the end"

    def test_a_damaged_header_is_not_the_end(self, tmp_path: Path) -> None:
        data = bytearray(tar([("0.jpg", image(0)), ("1.jpg", image(1)), ("2.jpg", image(2))]))
        second = data.index(b"1.jpg")
        data[second + 20] = 1
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(SemiscaleError, match=f"damaged header, or another tar appended at byte {second}"):
            read(str(tmp_path))

    def test_a_member_that_is_too_large_for_an_image_is_counted_unread(self, tmp_path: Path) -> None:
        large, size_bytes = tarfile.TarInfo("1.jpg"), shard.MAX_IMAGE_BYTES + 512
        large.size = size_bytes
        with (tmp_path / "a.tar").open("wb") as file:  # a hole on the disk
            file.write(tar([("0.jpg", image(0))])[:1536] + large.tobuf(tarfile.USTAR_FORMAT))
            file.seek(size_bytes, io.SEEK_CUR)
            file.write(tar([("2.jpg", image(2))]))
        assert brief(read(str(tmp_path))) == [("0", None, ""), ("1", None, "more than 1 GiB"), ("2", None, "")]

    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
    def test_a_member_that_claims_to_be_huge(self, tmp_path: Path, kind: bytes) -> None:
        huge = tarfile.TarInfo("1.jpg")
        huge.size, huge.type = 1 << 62, kind
        header = huge.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(tar([("0.jpg", image(0))])[:1536] + header + bytes(1024))
        with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.tar: [^\n]*\[SEMI-E054\]$"):
            read(str(tmp_path))

    def test_tars_appended_to_each_other_are_not_cut_short(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(tar([("0.jpg", image(0))]) + tar([("1.jpg", image(1))]))
        with pytest.raises(SemiscaleError, match="another tar appended at byte"):
            read(str(tmp_path))

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "b/a.tar.zst"])
    def test_a_compressed_tar_is_refused(self, tmp_path: Path, name: str) -> None:
        storage.write_bytes(str(tmp_path / name), b"")
        storage.write_bytes(str(tmp_path / "0.jpg"), b"")
        with pytest.raises(InvalidInputError, match=rf"^{tmp_path}: {name} .*\[SEMI-E051\]$"):
            listing.list_shards([str(tmp_path)])


class TestParquet:
    def test_bytes(self, tmp_path: Path) -> None:
        images = [image(number) for number in range(3)]
        samples = read_parquet(tmp_path, {"image": images, "label": [2, 0, 1]}, SampleFields())
        assert [sample.image for sample in samples] == images
        assert brief(samples) == [("0", "2", ""), ("1", "0", ""), ("2", "1", "")]
        assert {(sample.uri, sample.offset) for sample in samples} == {(str(tmp_path / "a.parquet"), -1)}

    def test_several_row_groups_and_reads(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parquet_reader, "ROWS_PER_READ", 3)
        images = [image(number) for number in range(20)]
        uri = storage.join(bucket, "a.parquet")
        storage.write_bytes(uri, parquet({"image": images}, row_group_size=7))
        samples = read(uri)
        assert [(sample.index, sample.image) for sample in samples] == list(enumerate(images))

    def test_uris(self, bucket: str) -> None:
        for number in range(2):
            storage.write_bytes(storage.join(bucket, f"images/{number} #.jpg"), image(number))
        storage.write_bytes(storage.join(bucket, "images/empty.jpg"), b"")
        names = ["images/1 #.jpg", storage.join(bucket, "images/0 #.jpg"), "images/none.jpg", "images/empty.jpg"]
        storage.write_bytes(storage.join(bucket, "a.parquet"), parquet({"image": names}))
        samples = read(storage.join(bucket, "a.parquet"))
        assert [sample.image for sample in samples] == [image(1), image(0), b"", b""]
        assert [sample.problem for sample in samples] == ["", "", "missing file", "empty file"]
        for sample in samples[:2]:
            assert reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image)) == sample.image

    @pytest.mark.parametrize("link", ["https://host/a.jpg", "nul\0.jpg", "n" * 5000, "file://host/a.jpg"])
    def test_what_is_not_a_uri_is_counted(self, tmp_path: Path, link: str) -> None:
        (sample,) = read_parquet(tmp_path, {"image": [link]})
        assert sample.problem in ("not a URI of gs://, s3:// or file://", "missing file")

    @pytest.mark.parametrize("scheme", ["gs", "s3"])
    @pytest.mark.parametrize(
        "name",
        ["two words/a.jpg", "b" * 300 + "/a.jpg", "b\u00fccket/a.jpg", "bucket", "bucket/", "bucket/" + "\u00e9" * 513],
    )
    def test_what_no_object_is_called_is_counted(self, tmp_path: Path, scheme: str, name: str) -> None:
        (sample,) = read_parquet(tmp_path, {"image": [f"{scheme}://{name}"]})
        assert sample.problem == "not a URI of gs://, s3:// or file://"

    def test_a_long_link_is_followed(self, remote: str, tmp_path: Path) -> None:
        uri = storage.join(remote, "é" * 508 + ".jpg")
        storage.write_bytes(uri, image(0))
        (sample,) = read_parquet(tmp_path, {"image": [uri]})
        assert sample.image == image(0)

    def test_the_pair_of_hugging_face(self, tmp_path: Path) -> None:
        (tmp_path / "b.jpg").write_bytes(image(1))
        pairs = [
            {"bytes": image(0), "path": "anything.jpg"},
            {"bytes": None, "path": "b.jpg"},
            {"bytes": None, "path": None},
            None,
        ]
        samples = read_parquet(tmp_path, {"image": pairs})
        assert [sample.image for sample in samples] == [image(0), image(1), b"", b""]
        assert [sample.problem for sample in samples] == ["", "", "empty image", "empty image"]

    def test_empty_images(self, tmp_path: Path) -> None:
        samples = read_parquet(tmp_path, {"image": [b"", None, image(0)]})
        assert [sample.problem for sample in samples] == ["empty image", "empty image", ""]

    def test_other_column_names(self, tmp_path: Path) -> None:
        columns = {"jpg": [image(0)], "class": ["cat"], "label": ["other"], "image": [1]}
        assert brief(read_parquet(tmp_path, columns, SampleFields("jpg", "class"))) == [("0", "cat", "")]

    def test_a_key_column(self, tmp_path: Path) -> None:
        samples = read_parquet(tmp_path, {"image": [image(0)] * 3, "key": ["a/b", None, "c"]})
        assert [sample.key for sample in samples] == ["a/b", "1", "c"]
        assert [sample.key for sample in read_parquet(tmp_path, {"image": [image(0)], "key": [17]})] == ["17"]
        keys = pa.array([b"k\xc3\xa9", b"\xff", None], pa.binary())
        samples = read_parquet(tmp_path, {"image": [image(0)] * 3, "key": keys})
        assert [sample.key for sample in samples] == ["k\u00e9", "\ufffd", "2"]

    def test_the_key_column_can_be_the_label(self, tmp_path: Path) -> None:
        columns = {"image": [image(0)], "key": ["cat"]}
        assert brief(read_parquet(tmp_path, columns, SampleFields(label="key"))) == [("cat", "cat", "")]

    def test_labels_as_text(self, tmp_path: Path) -> None:
        # Pandas writes integers with gaps as floats.
        columns = {"image": [image(0)] * 3, "label": [2.0, None, float("nan")]}
        assert [sample.label for sample in read_parquet(tmp_path, columns, SampleFields())] == ["2", None, None]

    def test_strings_in_a_dictionary(self, tmp_path: Path) -> None:
        (tmp_path / "b.jpg").write_bytes(image(1))
        links = pa.array(["b.jpg", "b.jpg"]).dictionary_encode()
        assert [sample.image for sample in read_parquet(tmp_path, {"image": links})] == [image(1)] * 2

    @pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())])
    def test_bytes_of_other_widths(self, tmp_path: Path, kind: pa.DataType) -> None:
        column = pa.array([image(0), image(1)]).cast(kind)
        assert [sample.image for sample in read_parquet(tmp_path, {"image": column})] == [image(0), image(1)]

    def test_no_rows(self, tmp_path: Path) -> None:
        assert read_parquet(tmp_path, {"image": pa.array([], pa.binary())}) == []

    def test_a_missing_column_is_refused(self, tmp_path: Path) -> None:
        there = f"{tmp_path}/a.parquet: .*'{{}}'.*{{}}_column.* img, label.*SEMI-E058"
        with pytest.raises(InvalidInputError, match="^" + there.format("image", "image")):
            read_parquet(tmp_path, {"img": [image(0)], "label": [1]})
        with pytest.raises(InvalidInputError, match="^" + there.format("class", "label")):
            read_parquet(tmp_path, {"img": [image(0)], "label": [1]}, SampleFields("img", "class"))

    @pytest.mark.parametrize("name", ["image", "label", "key"])
    def test_several_columns_of_one_name_are_refused(self, tmp_path: Path, name: str) -> None:
        table = pa.table([[image(0)], ["cat"], ["a"], ["b"]], ["image", "label", "key", name])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InvalidInputError, match=rf"a\.parquet: .*'{name}'.*SEMI-E059"):
            read(str(tmp_path), SampleFields())

    @pytest.mark.parametrize(
        "values", [[1, 2], [[1.0], [2.0]], [{"height": 1}, {"height": 2}], [{"bytes": 1}], [{"bytes": b"x", "path": 1}]]
    )
    def test_a_column_of_something_else_is_refused(self, tmp_path: Path, values: list[Any]) -> None:
        with pytest.raises(InvalidInputError, match=r"a.parquet: .*SEMI-E060"):
            read_parquet(tmp_path, {"image": values})

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"text" * 100, image(0)])
    def test_what_is_not_parquet_is_refused(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(InvalidInputError, match=rf"^{tmp_path}/a.parquet: [^\n]+\[SEMI-E056\]$"):
            read(str(tmp_path))

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(parquet({"image": [image(0)]})[:-100])
        with pytest.raises(InvalidInputError, match=r"a.parquet: .*SEMI-E056"):
            read(str(tmp_path))

    def test_a_footer_that_forgets_rows_is_damaged(self, tmp_path: Path) -> None:
        """Each of the numbers that may be a row group's rows is made smaller, in Thrift's zigzag as 9 became 5."""
        whole = parquet({"image": [image(number) for number in range(40)]}, row_group_size=9)
        path, outcomes = tmp_path / "a.parquet", set()
        for place in range(len(whole) - 2 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
            if whole[place] == 2 * 9:
                path.write_bytes(whole[:place] + bytes([2 * 5]) + whole[place + 1 :])
                try:
                    outcomes.add(str(len(read(str(path)))))
                except SemiscaleError as error:
                    outcomes.add(error.code)
        assert outcomes == {"40", "SEMI-E056"}

    def test_names_of_columns_that_are_not_utf8(self, tmp_path: Path) -> None:
        whole = parquet({"image": [b"x"], "other": [1]}, store_schema=False)
        (tmp_path / "a.parquet").write_bytes(whole.replace(b"other", b"\xff\xffher"))
        with pytest.raises(InvalidInputError, match=r"'utf-8' codec.*SEMI-E056"):
            read(str(tmp_path))

    def test_damaged_pages(self, tmp_path: Path) -> None:
        data = bytearray(parquet({"image": [image(number) for number in range(50)]}, compression="zstd"))
        data[4:600] = bytes(596)
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.parquet: [^\n]*\[SEMI-E057\]$"):
            read(str(tmp_path))


class TestLooseFiles:
    def test_class_folders(self, bucket: str) -> None:
        for name in ("cat/1.jpg", "cat/2.JPEG", "dog/1.png", "a b/#/1.webp", "top.jpg"):
            storage.write_bytes(storage.join(bucket, name), image(len(name)))
        samples = read(bucket)
        found = [
            ("a b/#/1.webp", "#"),
            ("cat/1.jpg", "cat"),
            ("cat/2.JPEG", "cat"),
            ("dog/1.png", "dog"),
            ("top.jpg", None),
        ]
        assert [(sample.key, sample.label) for sample in samples] == found
        for sample in samples:
            assert sample.uri == storage.join(bucket, sample.key)
            assert (
                reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image))
                == sample.image
                == image(len(sample.key))
            )

    def test_slices(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listing, "FILES_PER_SHARD", 4)
        monkeypatch.setattr(listing, "MAX_FILES_PER_SHARD", 6)
        for number in range(20):
            storage.write_bytes(storage.join(bucket, f"{number:02}.jpg"), image(number))
        found = listing.list_shards([bucket + "/"])
        assert 3 < len(found) < 10
        assert max(len(shard.files) for shard in found) <= 6
        assert [shard.name for shard in found] == [f"files from {shard.files[0].name}" for shard in found]
        assert {shard.uri for shard in found} == {bucket}
        assert found[-1].size_bytes == sum(file.size_bytes for file in found[-1].files)
        samples = [sample for shard in found for sample in reader.iter_samples(shard, SampleFields())]
        assert [sample.index for sample in samples] == [place for one in found for place in range(len(one.files))]
        assert [sample.image for sample in samples] == [image(number) for number in range(20)]

    def test_a_file_more_or_less_changes_its_own_slice_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listing, "FILES_PER_SHARD", 8)
        monkeypatch.setattr(listing, "MAX_FILES_PER_SHARD", 32)
        for number in range(200):
            (tmp_path / f"m{number:03}.jpg").write_bytes(b"x")
        before = {shard.digest(): len(shard.files) for shard in listing.list_shards([str(tmp_path)])}
        assert 15 < len(before) < 40
        for name in ("a.jpg", "m050b.jpg", "m123.jpg", "z.jpg"):
            path = tmp_path / name
            if there := path.exists():
                path.unlink()
            else:
                path.write_bytes(b"x")
            after = {shard.digest(): len(shard.files) for shard in listing.list_shards([str(tmp_path)])}
            assert len(before.keys() - after.keys()) <= 1
            assert sum(after.values()) == sum(before.values()) + (-1 if there else 1)
            before = after

    def test_an_empty_file_is_counted(self, bucket: str) -> None:
        for name in ("0.jpg", "1.jpg"):
            storage.write_bytes(storage.join(bucket, name), b"" if name == "0.jpg" else image(0))
        assert [sample.problem for sample in read(bucket)] == ["empty file", ""]

    def test_a_file_that_is_too_large_for_an_image_is_counted_unread(self, tmp_path: Path) -> None:
        with (tmp_path / "0.jpg").open("wb") as file:
            file.truncate(shard.MAX_IMAGE_BYTES + 1)
        assert [sample.problem for sample in read(str(tmp_path))] == ["more than 1 GiB"]

    def test_a_link_to_nothing_is_counted(self, tmp_path: Path) -> None:
        (tmp_path / "0.jpg").symlink_to(tmp_path / "nothing")
        assert [sample.problem for sample in read(str(tmp_path))] == ["missing file"]

    @pytest.mark.parametrize("what", ["gone", "changed"])
    def test_a_file_that_went_away_or_changed_is_refused_by_name(self, bucket: str, what: str) -> None:
        for number in range(3):
            storage.write_bytes(storage.join(bucket, f"{number}.jpg"), image(number))
        (shard,) = listing.list_shards([bucket])
        victim = storage.join(bucket, "1.jpg")
        if what == "gone":
            storage.delete(victim)
        else:
            storage.write_bytes(victim, image(7))
        with pytest.raises(SemiscaleError, match=f"(?i)^{victim}: .*{what} since it was listed.*run the plan again"):
            list(reader.iter_samples(shard, SampleFields()))

    def test_a_link_to_a_folder_above_is_followed_once(self, tmp_path: Path) -> None:
        storage.write_bytes(str(tmp_path / "b" / "1.jpg"), image(1))
        (tmp_path / "b" / "loop").symlink_to(tmp_path)
        (tmp_path / "a").symlink_to(tmp_path / "b")
        elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
        storage.write_bytes(str(elsewhere / "2.jpg"), image(2))
        (tmp_path / "c").symlink_to(elsewhere)
        assert [sample.key for sample in read(str(tmp_path))] == ["b/1.jpg", "c/2.jpg"]

    def test_hidden_files_are_left_out(self, bucket: str) -> None:
        for name in ("cat/1.jpg", "cat/._1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg"):
            storage.write_bytes(storage.join(bucket, name), image(0))
        assert [sample.key for sample in read(bucket)] == ["cat/1.jpg"]

    def test_a_hidden_folder_above_is_no_matter(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, ".cache/set/cat/1.jpg"), image(0))
        assert [sample.key for sample in read(storage.join(bucket, ".cache/set"))] == ["cat/1.jpg"]

    def test_one_image(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "cat/1.jpg"), image(0))
        (sample,) = read(storage.join(bucket, "cat/1.jpg"))
        assert (sample.key, sample.image) == ("1.jpg", image(0))


class TestFind:
    def test_a_mix(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "b/one.TAR"), tar([("0.jpg", image(0))]))
        storage.write_bytes(storage.join(bucket, "a/two.parquet"), parquet({"image": [image(1)]}))
        storage.write_bytes(storage.join(bucket, "c/three.jpg"), image(2))
        storage.write_bytes(storage.join(bucket, "README.md"), b"")
        storage.write_bytes(storage.join(bucket, "b.tar.idx"), b"")
        found = listing.list_shards([bucket])
        assert [(shard.kind, shard.name) for shard in found] == [
            ("parquet", "a/two.parquet"),
            ("tar", "b/one.TAR"),
            ("files", "files from c/three.jpg"),
        ]
        assert [sample.image for sample in read(bucket)] == [image(1), image(0), image(2)]

    def test_uris_in_order(self, bucket: str) -> None:
        for name in ("a.tar", "b.tar"):
            storage.write_bytes(storage.join(bucket, name), tar([]))
        found = listing.list_shards([storage.join(bucket, "b.tar"), storage.join(bucket, "a.tar")])
        assert [shard.name for shard in found] == ["b.tar", "a.tar"]

    def test_equal_names_are_told_apart_by_what_survives_a_move(self, tmp_path: Path) -> None:
        for name in ("x/pool/a.tar", "y/pool/a.tar", "z/pool/a.tar", "z/pool/c.tar"):
            storage.write_bytes(str(tmp_path / name), tar([]))
        uris = [str(tmp_path / name) for name in ("x/pool", "y/pool", "x/pool", "z/pool")]
        found = listing.list_shards(uris)
        assert [shard.name for shard in found] == ["a.tar", "pool/a.tar", "a.tar", "pool-4/a.tar", "c.tar"]
        assert len({shard.digest() for shard in found}) == 4

    def test_a_relative_path_and_a_file_uri_are_the_same_shards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a.tar").write_bytes(tar([]))
        (tmp_path / "set" / "a.jpg").write_bytes(image(0))
        monkeypatch.chdir(tmp_path)
        expected = listing.list_shards([str(tmp_path / "set")])
        assert [shard.name for shard in expected] == ["a.tar", "files from a.jpg"]
        for uri in ("set", "./set/", f"file://{tmp_path}/set", f"{tmp_path}/set/"):
            assert [shard.digest() for shard in listing.list_shards([uri])] == [shard.digest() for shard in expected]

    def test_the_digest_follows_the_bytes(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "a.tar"), tar([("0.jpg", image(0))]))
        storage.write_bytes(storage.join(bucket, "0.jpg"), image(0))
        first = [shard.digest() for shard in listing.list_shards([bucket])]
        assert first == [shard.digest() for shard in listing.list_shards([bucket])]
        storage.write_bytes(storage.join(bucket, "a.tar"), tar([("0.jpg", image(0)), ("1.jpg", image(1))]))
        storage.write_bytes(storage.join(bucket, "0.jpg"), image(0, "PNG"))
        assert not {shard.digest() for shard in listing.list_shards([bucket])} & set(first)

    def test_an_empty_prefix_is_refused(self, bucket: str) -> None:
        with pytest.raises(InvalidInputError, match=rf"^{bucket}: nothing here.*\[SEMI-E052\]$"):
            listing.list_shards([bucket])
        storage.write_bytes(storage.join(bucket, "a.txt"), b"")
        with pytest.raises(InvalidInputError, match=rf"^{bucket}: 1 files, none.*\[SEMI-E052\]$"):
            listing.list_shards([bucket])

    @pytest.mark.parametrize("uri", ["", " "])
    def test_an_empty_uri_is_refused(self, uri: str) -> None:
        with pytest.raises(InvalidInputError, match=r"SEMI-E050"):
            listing.list_shards([uri])

    def test_an_unknown_scheme_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match=r"^http://host/a.tar: .*SEMI-E022"):
            listing.list_shards(["http://host/a.tar"])


class TestRead:
    def test_the_same_again(self, bucket: str) -> None:
        storage.write_bytes(storage.join(bucket, "a.tar"), tar([(f"{n}.jpg", image(n)) for n in range(4)]))
        storage.write_bytes(storage.join(bucket, "a.parquet"), parquet({"image": [image(n) for n in range(4)]}))
        storage.write_bytes(storage.join(bucket, "0.jpg"), image(0))
        assert read(bucket) == read(bucket)

    def test_a_shard_survives_json(self, tmp_path: Path) -> None:
        (tmp_path / "0.jpg").write_bytes(image(0))
        (shard,) = listing.list_shards([str(tmp_path)])
        assert Shard.model_validate_json(shard.model_dump_json()) == shard

    @pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
    def test_a_shard_that_went_away(self, bucket: str, name: str) -> None:
        storage.write_bytes(storage.join(bucket, name), b"x")
        (shard,) = listing.list_shards([bucket])
        storage.delete(shard.uri)
        with pytest.raises(FileNotFoundError):
            list(reader.iter_samples(shard, SampleFields()))

    @pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
    def test_a_shard_that_changed_is_not_read(self, bucket: str, name: str) -> None:
        storage.write_bytes(storage.join(bucket, name), b"x")
        (shard,) = listing.list_shards([bucket])
        storage.write_bytes(shard.uri, b"other")
        with pytest.raises(SemiscaleError, match=f"^{shard.uri}: .*SEMI-E021"):
            list(reader.iter_samples(shard, SampleFields()))

    def test_breaking_off_closes_the_file(self, tmp_path: Path) -> None:
        # Warnings are errors in the tests: an open file would be one.
        (tmp_path / "a.tar").write_bytes(tar([(f"{n}.jpg", image(n)) for n in range(4)]))
        (shard,) = listing.list_shards([str(tmp_path)])
        samples = reader.iter_samples(shard, SampleFields())
        assert next(samples).index == 0
        del samples


def test_a_star_names_the_files_of_a_folder_that_match(tmp_path: Path) -> None:
    for name in ("part-0.tar", "part-1.tar", "other.tar"):
        pictures.write_tar(tmp_path / name, {"a.png": b"x"})
    assert [shard.name for shard in listing.list_shards([str(tmp_path / "part-*.tar")])] == ["part-0.tar", "part-1.tar"]
    with pytest.raises(InvalidInputError, match=r"3 files, none.*SEMI-E052"):
        listing.list_shards([str(tmp_path / "no-*.tar")])


class TestWhatIsMadeToFillAPodsMemory:
    """Of an image or a tar, or of a link to what has no end."""

    def test_of_a_linked_file_that_is_too_large_no_more_is_read_than_tells(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parquet_reader, "MAX_IMAGE_BYTES", 100_000)
        for number, size_bytes in enumerate((100_000, 100_001)):
            (tmp_path / str(number)).write_bytes(bytes(size_bytes))
        pq.write_table(pa.table({"image": ["0", "1"]}), tmp_path / "a.parquet")
        (shard,) = listing.list_shards([str(tmp_path / "a.parquet")])
        for videos, problem in ((False, "more than 1 GiB"), (True, "")):
            samples = list(reader.iter_samples(shard, SampleFields(label="", videos=videos)))
            assert [sample.problem for sample in samples] == ["", problem]

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("before", [0, 1])
    def test_a_tar_with_a_name_of_megabytes_is_damaged(self, tmp_path: Path, format: int, before: int) -> None:
        long = "x" * 1_100_000 + ".jpg"
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as file:
            for name in [f"{number}.jpg" for number in range(before)] + [long]:
                member = tarfile.TarInfo(name)
                member.size = len(image(0))
                file.addfile(member, io.BytesIO(image(0)))
        (shard,) = listing.list_shards([str(tmp_path)])
        with pytest.raises(SemiscaleError, match=r"a header of 1,100,\d\d\d bytes") as refusal:
            list(reader.iter_samples(shard, SampleFields()))
        assert len(str(refusal.value)) < 500

    def test_of_a_tar_that_is_all_one_sample_an_image_is_read(self, tmp_path: Path) -> None:
        names = [f"www.example.com_{number}.jpg" for number in range(20)]
        (tmp_path / "a.tar").write_bytes(tar([(name, bytes(1 << 20)) for name in names]))
        (shard,) = listing.list_shards([str(tmp_path)])
        with traced_memory() as peak_bytes:
            samples = list(reader.iter_samples(shard, SampleFields()))
            assert peak_bytes() < 4 << 20
        assert [(sample.key, sample.problem) for sample in samples] == [("www", "several image members")]

    def test_a_parquet_file_of_one_large_row_group_comes_page_by_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = [np.random.default_rng(number).bytes(1 << 14) for number in range(1 << 12)]
        columns = {"image": images, "key": list(map(str, range(1 << 12)))}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_batch_size=16)
        assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
        (shard,) = listing.list_shards([str(tmp_path)])
        held = []
        for most in (parquet_reader.MAX_GROUP_BYTES, 1 << 20):
            monkeypatch.setattr(parquet_reader, "MAX_GROUP_BYTES", most)
            before = pa.total_allocated_bytes()
            with traced_memory() as peak_bytes:
                samples = reader.iter_samples(shard, SampleFields(label=""))
                first = next(samples)
                held.append(peak_bytes() + pa.total_allocated_bytes() - before)
            assert [first.image, *(sample.image for sample in samples)] == images
        assert held[1] < held[0] / 2, held

    def test_a_link_to_a_device_or_a_pipe_is_missing(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        links = ["/dev/zero", "file:///dev/zero", "pipe.jpg", str(tmp_path)]
        pq.write_table(pa.table({"image": links}), tmp_path / "a.parquet")
        (shard,) = listing.list_shards([str(tmp_path / "a.parquet")])
        samples = list(reader.iter_samples(shard, SampleFields(label=""), prefetch=True))
        assert [(sample.image, sample.problem) for sample in samples] == [(b"", "missing file")] * 4
