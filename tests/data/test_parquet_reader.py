"""Test the Parquet reader: column types, links to images and damaged files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing, parquet_reader, reader
from semiscale.data.shard import SampleFields
from tests.support.shard_files import make_image, make_parquet, read_parquet, read_samples, summarize, trace_memory


def test_a_sample_has_its_bytes_label_and_row(tmp_path: Path) -> None:
    images = [make_image(number) for number in range(3)]
    samples = read_parquet(tmp_path, {"image": images, "label": [2, 0, 1]}, SampleFields())
    assert [sample.image for sample in samples] == images
    assert summarize(samples) == [("0", "2", ""), ("1", "0", ""), ("2", "1", "")]
    assert {(sample.uri, sample.offset) for sample in samples} == {(str(tmp_path / "a.parquet"), -1)}


def test_row_groups_are_read_in_order(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "ROWS_PER_READ", 3)
    images = [make_image(number) for number in range(20)]
    uri = storage.join(bucket, "a.parquet")
    storage.write_bytes(uri, make_parquet({"image": images}, row_group_size=7))
    samples = read_samples(uri)
    assert [(sample.index, sample.image) for sample in samples] == list(enumerate(images))


def test_uris_are_followed(bucket: str) -> None:
    for number in range(2):
        storage.write_bytes(storage.join(bucket, f"images/{number} #.jpg"), make_image(number))
    storage.write_bytes(storage.join(bucket, "images/empty.jpg"), b"")
    names = ["images/1 #.jpg", storage.join(bucket, "images/0 #.jpg"), "images/none.jpg", "images/empty.jpg"]
    storage.write_bytes(storage.join(bucket, "a.parquet"), make_parquet({"image": names}))
    samples = read_samples(storage.join(bucket, "a.parquet"))
    assert [sample.image for sample in samples] == [make_image(1), make_image(0), b"", b""]
    assert [sample.problem for sample in samples] == ["", "", "missing file", "empty file"]
    for sample in samples[:2]:
        assert reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image)) == sample.image


@pytest.mark.parametrize("link", ["https://host/a.jpg", "nul\0.jpg", "n" * 5000, "file://host/a.jpg"])
def test_a_link_that_is_not_a_uri_is_counted(tmp_path: Path, link: str) -> None:
    (sample,) = read_parquet(tmp_path, {"image": [link]})
    assert sample.problem in ("not a URI of gs://, s3:// or file://", "missing file")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    "name",
    ["two words/a.jpg", "b" * 300 + "/a.jpg", "b\u00fccket/a.jpg", "bucket", "bucket/", "bucket/" + "\u00e9" * 513],
)
def test_a_link_that_no_object_can_have_is_counted(tmp_path: Path, scheme: str, name: str) -> None:
    (sample,) = read_parquet(tmp_path, {"image": [f"{scheme}://{name}"]})
    assert sample.problem == "not a URI of gs://, s3:// or file://"


def test_a_long_link_is_followed(remote: str, tmp_path: Path) -> None:
    uri = storage.join(remote, "é" * 508 + ".jpg")
    storage.write_bytes(uri, make_image(0))
    (sample,) = read_parquet(tmp_path, {"image": [uri]})
    assert sample.image == make_image(0)


def test_a_link_to_a_device_a_pipe_or_a_folder_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    links = ["/dev/zero", "file:///dev/zero", "pipe.jpg", str(tmp_path)]
    pq.write_table(pa.table({"image": links}), tmp_path / "a.parquet")
    (shard,) = listing.list_shards([str(tmp_path / "a.parquet")])
    samples = list(reader.iter_samples(shard, SampleFields(label=""), prefetch=True))
    assert [(sample.image, sample.problem) for sample in samples] == [(b"", "missing file")] * 4


def test_a_linked_image_above_the_limit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_IMAGE_BYTES", 100_000)
    for number, size_bytes in enumerate((100_000, 100_001)):
        (tmp_path / str(number)).write_bytes(bytes(size_bytes))
    pq.write_table(pa.table({"image": ["0", "1"]}), tmp_path / "a.parquet")
    (shard,) = listing.list_shards([str(tmp_path / "a.parquet")])
    for videos, problem in ((False, "more than 1 GiB"), (True, "")):
        samples = list(reader.iter_samples(shard, SampleFields(label="", videos=videos)))
        assert [sample.problem for sample in samples] == ["", problem]


def test_hugging_faces_pairs_of_bytes_and_path_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(make_image(1))
    pairs = [
        {"bytes": make_image(0), "path": "anything.jpg"},
        {"bytes": None, "path": "b.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    samples = read_parquet(tmp_path, {"image": pairs})
    assert [sample.image for sample in samples] == [make_image(0), make_image(1), b"", b""]
    assert [sample.problem for sample in samples] == ["", "", "empty image", "empty image"]


def test_empty_images_are_counted(tmp_path: Path) -> None:
    samples = read_parquet(tmp_path, {"image": [b"", None, make_image(0)]})
    assert [sample.problem for sample in samples] == ["empty image", "empty image", ""]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    columns = {"jpg": [make_image(0)], "class": ["cat"], "label": ["other"], "image": [1]}
    assert summarize(read_parquet(tmp_path, columns, SampleFields("jpg", "class"))) == [("0", "cat", "")]


def test_keys_come_from_their_column_or_are_the_row(tmp_path: Path) -> None:
    samples = read_parquet(tmp_path, {"image": [make_image(0)] * 3, "key": ["a/b", None, "c"]})
    assert [sample.key for sample in samples] == ["a/b", "1", "c"]
    assert [sample.key for sample in read_parquet(tmp_path, {"image": [make_image(0)], "key": [17]})] == ["17"]
    keys = pa.array([b"k\xc3\xa9", b"\xff", None], pa.binary())
    samples = read_parquet(tmp_path, {"image": [make_image(0)] * 3, "key": keys})
    assert [sample.key for sample in samples] == ["k\u00e9", "\ufffd", "2"]


def test_the_key_column_can_be_the_label(tmp_path: Path) -> None:
    columns = {"image": [make_image(0)], "key": ["cat"]}
    assert summarize(read_parquet(tmp_path, columns, SampleFields(label="key"))) == [("cat", "cat", "")]


def test_labels_are_text(tmp_path: Path) -> None:
    # Pandas writes integers with gaps as floats.
    columns = {"image": [make_image(0)] * 3, "label": [2.0, None, float("nan")]}
    assert [sample.label for sample in read_parquet(tmp_path, columns, SampleFields())] == ["2", None, None]


def test_dictionary_encoded_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(make_image(1))
    links = pa.array(["b.jpg", "b.jpg"]).dictionary_encode()
    assert [sample.image for sample in read_parquet(tmp_path, {"image": links})] == [make_image(1)] * 2


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())])
def test_all_binary_types_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([make_image(0), make_image(1)]).cast(kind)
    assert [sample.image for sample in read_parquet(tmp_path, {"image": column})] == [make_image(0), make_image(1)]


def test_a_file_without_rows_has_no_samples(tmp_path: Path) -> None:
    assert read_parquet(tmp_path, {"image": pa.array([], pa.binary())}) == []


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    message = f"{tmp_path}/a.parquet: .*'{{}}'.*{{}}_column.* img, label.*SEMI-E058"
    with pytest.raises(InvalidInputError, match="^" + message.format("image", "image")):
        read_parquet(tmp_path, {"img": [make_image(0)], "label": [1]})
    with pytest.raises(InvalidInputError, match="^" + message.format("class", "label")):
        read_parquet(tmp_path, {"img": [make_image(0)], "label": [1]}, SampleFields("img", "class"))


@pytest.mark.parametrize("name", ["image", "label", "key"])
def test_several_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    table = pa.table([[make_image(0)], ["cat"], ["a"], ["b"]], ["image", "label", "key", name])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=rf"a\.parquet: .*'{name}'.*SEMI-E059"):
        read_samples(str(tmp_path), SampleFields())


@pytest.mark.parametrize(
    "values", [[1, 2], [[1.0], [2.0]], [{"height": 1}, {"height": 2}], [{"bytes": 1}], [{"bytes": b"x", "path": 1}]]
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, values: list[Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"a.parquet: .*SEMI-E060"):
        read_parquet(tmp_path, {"image": values})


@pytest.mark.parametrize("data", [b"", b"PAR1", b"text" * 100, make_image(0)])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(InvalidInputError, match=rf"^{tmp_path}/a.parquet: [^\n]+\[SEMI-E056\]$"):
        read_samples(str(tmp_path))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(make_parquet({"image": [make_image(0)]})[:-100])
    with pytest.raises(InvalidInputError, match=r"a.parquet: .*SEMI-E056"):
        read_samples(str(tmp_path))


def test_a_footer_with_too_few_rows_is_damaged(tmp_path: Path) -> None:
    # Every number of the footer that may count the rows of a row group is changed from 9 to 5. Thrift's zigzag
    # encoding doubles positive numbers.
    whole = make_parquet({"image": [make_image(number) for number in range(40)]}, row_group_size=9)
    path, outcomes = tmp_path / "a.parquet", set()
    for position in range(len(whole) - 2 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
        if whole[position] == 2 * 9:
            path.write_bytes(whole[:position] + bytes([2 * 5]) + whole[position + 1 :])
            try:
                outcomes.add(str(len(read_samples(str(path)))))
            except SemiscaleError as error:
                outcomes.add(error.code)
    assert outcomes == {"40", "SEMI-E056"}


def test_a_column_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    whole = make_parquet({"image": [b"x"], "other": [1]}, store_schema=False)
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"other", b"\xff\xffher"))
    with pytest.raises(InvalidInputError, match=r"'utf-8' codec.*SEMI-E056"):
        read_samples(str(tmp_path))


def test_damaged_pages_are_refused(tmp_path: Path) -> None:
    data = bytearray(make_parquet({"image": [make_image(number) for number in range(50)]}, compression="zstd"))
    data[4:600] = bytes(596)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/a.parquet: [^\n]*\[SEMI-E057\]$"):
        read_samples(str(tmp_path))


def test_a_large_row_group_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.random.default_rng(number).bytes(1 << 14) for number in range(1 << 12)]
    columns = {"image": images, "key": list(map(str, range(1 << 12)))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_batch_size=16)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    (shard,) = listing.list_shards([str(tmp_path)])
    peaks_bytes = []
    for limit_bytes in (parquet_reader.MAX_GROUP_BYTES, 1 << 20):
        monkeypatch.setattr(parquet_reader, "MAX_GROUP_BYTES", limit_bytes)
        before_bytes = pa.total_allocated_bytes()
        with trace_memory() as peak_bytes:
            samples = reader.iter_samples(shard, SampleFields(label=""))
            first = next(samples)
            peaks_bytes.append(peak_bytes() + pa.total_allocated_bytes() - before_bytes)
        assert [first.image, *(sample.image for sample in samples)] == images
    assert peaks_bytes[1] < peaks_bytes[0] / 2, peaks_bytes
