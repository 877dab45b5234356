"""Test the reader of loose image files: keys, labels and changed files."""

from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import listing, reader, shard
from semiscale.data.shard import SampleFields
from tests.support.shard_files import make_image, read_samples


def test_a_label_is_the_name_of_the_folder(bucket: str) -> None:
    for name in ("cat/1.jpg", "cat/2.JPEG", "dog/1.png", "a b/#/1.webp", "top.jpg"):
        storage.write_bytes(storage.join(bucket, name), make_image(len(name)))
    samples = read_samples(bucket)
    expected = [
        ("a b/#/1.webp", "#"),
        ("cat/1.jpg", "cat"),
        ("cat/2.JPEG", "cat"),
        ("dog/1.png", "dog"),
        ("top.jpg", None),
    ]
    assert [(sample.key, sample.label) for sample in samples] == expected
    for sample in samples:
        assert sample.uri == storage.join(bucket, sample.key)
        assert (
            reader.read_sample_bytes(sample.uri, sample.offset, len(sample.image))
            == sample.image
            == make_image(len(sample.key))
        )


def test_an_empty_file_is_counted(bucket: str) -> None:
    for name in ("0.jpg", "1.jpg"):
        storage.write_bytes(storage.join(bucket, name), b"" if name == "0.jpg" else make_image(0))
    assert [sample.problem for sample in read_samples(bucket)] == ["empty file", ""]


def test_a_file_above_the_limit_of_an_image_is_counted_unread(tmp_path: Path) -> None:
    with (tmp_path / "0.jpg").open("wb") as file:
        file.truncate(shard.MAX_IMAGE_BYTES + 1)
    assert [sample.problem for sample in read_samples(str(tmp_path))] == ["more than 1 GiB"]


def test_a_link_to_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").symlink_to(tmp_path / "nothing")
    assert [sample.problem for sample in read_samples(str(tmp_path))] == ["missing file"]


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_file_that_is_gone_or_changed_is_refused_by_name(bucket: str, change: str) -> None:
    for number in range(3):
        storage.write_bytes(storage.join(bucket, f"{number}.jpg"), make_image(number))
    (shard,) = listing.list_shards([bucket])
    victim = storage.join(bucket, "1.jpg")
    if change == "gone":
        storage.delete(victim)
    else:
        storage.write_bytes(victim, make_image(7))
    with pytest.raises(SemiscaleError, match=f"(?i)^{victim}: .*{change} since it was listed.*run the plan again"):
        list(reader.iter_samples(shard, SampleFields()))


def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "b" / "1.jpg"), make_image(1))
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    storage.write_bytes(str(elsewhere / "2.jpg"), make_image(2))
    (tmp_path / "c").symlink_to(elsewhere)
    assert [sample.key for sample in read_samples(str(tmp_path))] == ["b/1.jpg", "c/2.jpg"]


def test_hidden_files_are_ignored(bucket: str) -> None:
    for name in ("cat/1.jpg", "cat/._1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg"):
        storage.write_bytes(storage.join(bucket, name), make_image(0))
    assert [sample.key for sample in read_samples(bucket)] == ["cat/1.jpg"]


def test_a_hidden_folder_above_the_uri_is_allowed(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, ".cache/set/cat/1.jpg"), make_image(0))
    assert [sample.key for sample in read_samples(storage.join(bucket, ".cache/set"))] == ["cat/1.jpg"]


def test_a_uri_can_be_a_single_image(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "cat/1.jpg"), make_image(0))
    (sample,) = read_samples(storage.join(bucket, "cat/1.jpg"))
    assert (sample.key, sample.image) == ("1.jpg", make_image(0))
