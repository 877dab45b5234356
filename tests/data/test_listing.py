"""Test the listing of shards: kinds, names, order, slices and digests."""

from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.data import listing, reader
from semiscale.data.shard import SampleFields
from tests.support import sample_images
from tests.support.shard_files import make_image, make_parquet, make_tar, read_samples


def test_all_kinds_of_shards_are_listed_together(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "b/one.TAR"), make_tar([("0.jpg", make_image(0))]))
    storage.write_bytes(storage.join(bucket, "a/two.parquet"), make_parquet({"image": [make_image(1)]}))
    storage.write_bytes(storage.join(bucket, "c/three.jpg"), make_image(2))
    storage.write_bytes(storage.join(bucket, "README.md"), b"")
    storage.write_bytes(storage.join(bucket, "b.tar.idx"), b"")
    shards = listing.list_shards([bucket])
    assert [(shard.kind, shard.name) for shard in shards] == [
        ("parquet", "a/two.parquet"),
        ("tar", "b/one.TAR"),
        ("files", "files from c/three.jpg"),
    ]
    assert [sample.image for sample in read_samples(bucket)] == [make_image(1), make_image(0), make_image(2)]


def test_shards_follow_the_order_of_the_uris(bucket: str) -> None:
    for name in ("a.tar", "b.tar"):
        storage.write_bytes(storage.join(bucket, name), make_tar([]))
    shards = listing.list_shards([storage.join(bucket, "b.tar"), storage.join(bucket, "a.tar")])
    assert [shard.name for shard in shards] == ["b.tar", "a.tar"]


def test_shards_of_equal_names_get_names_that_survive_a_move(tmp_path: Path) -> None:
    for name in ("x/pool/a.tar", "y/pool/a.tar", "z/pool/a.tar", "z/pool/c.tar"):
        storage.write_bytes(str(tmp_path / name), make_tar([]))
    uris = [str(tmp_path / name) for name in ("x/pool", "y/pool", "x/pool", "z/pool")]
    shards = listing.list_shards(uris)
    assert [shard.name for shard in shards] == ["a.tar", "pool/a.tar", "a.tar", "pool-4/a.tar", "c.tar"]
    assert len({shard.digest() for shard in shards}) == 4


def test_a_relative_path_and_a_file_uri_list_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(make_tar([]))
    (tmp_path / "set" / "a.jpg").write_bytes(make_image(0))
    monkeypatch.chdir(tmp_path)
    expected = listing.list_shards([str(tmp_path / "set")])
    assert [shard.name for shard in expected] == ["a.tar", "files from a.jpg"]
    for uri in ("set", "./set/", f"file://{tmp_path}/set", f"{tmp_path}/set/"):
        assert [shard.digest() for shard in listing.list_shards([uri])] == [shard.digest() for shard in expected]


def test_a_digest_changes_with_the_bytes(bucket: str) -> None:
    storage.write_bytes(storage.join(bucket, "a.tar"), make_tar([("0.jpg", make_image(0))]))
    storage.write_bytes(storage.join(bucket, "0.jpg"), make_image(0))
    first = [shard.digest() for shard in listing.list_shards([bucket])]
    assert first == [shard.digest() for shard in listing.list_shards([bucket])]
    storage.write_bytes(storage.join(bucket, "a.tar"), make_tar([("0.jpg", make_image(0)), ("1.jpg", make_image(1))]))
    storage.write_bytes(storage.join(bucket, "0.jpg"), make_image(0, "PNG"))
    assert not {shard.digest() for shard in listing.list_shards([bucket])} & set(first)


def test_a_star_matches_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("part-0.tar", "part-1.tar", "other.tar"):
        sample_images.write_tar(tmp_path / name, {"a.png": b"x"})
    assert [shard.name for shard in listing.list_shards([str(tmp_path / "part-*.tar")])] == ["part-0.tar", "part-1.tar"]
    with pytest.raises(InvalidInputError, match=r"3 files, none.*SEMI-E052"):
        listing.list_shards([str(tmp_path / "no-*.tar")])


def test_an_empty_prefix_is_refused(bucket: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{bucket}: nothing here.*\[SEMI-E052\]$"):
        listing.list_shards([bucket])
    storage.write_bytes(storage.join(bucket, "a.txt"), b"")
    with pytest.raises(InvalidInputError, match=rf"^{bucket}: 1 files, none.*\[SEMI-E052\]$"):
        listing.list_shards([bucket])


@pytest.mark.parametrize("uri", ["", " "])
def test_an_empty_uri_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInputError, match=r"SEMI-E050"):
        listing.list_shards([uri])


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^http://host/a.tar: .*SEMI-E022"):
        listing.list_shards(["http://host/a.tar"])


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "b/a.tar.zst"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    storage.write_bytes(str(tmp_path / name), b"")
    storage.write_bytes(str(tmp_path / "0.jpg"), b"")
    with pytest.raises(InvalidInputError, match=rf"^{tmp_path}: {name} .*\[SEMI-E051\]$"):
        listing.list_shards([str(tmp_path)])


def test_loose_files_are_listed_in_slices(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "FILES_PER_SHARD", 4)
    monkeypatch.setattr(listing, "MAX_FILES_PER_SHARD", 6)
    for number in range(20):
        storage.write_bytes(storage.join(bucket, f"{number:02}.jpg"), make_image(number))
    shards = listing.list_shards([bucket + "/"])
    assert 3 < len(shards) < 10
    assert max(len(shard.files) for shard in shards) <= 6
    assert [shard.name for shard in shards] == [f"files from {shard.files[0].name}" for shard in shards]
    assert {shard.uri for shard in shards} == {bucket}
    assert shards[-1].size_bytes == sum(file.size_bytes for file in shards[-1].files)
    samples = [sample for shard in shards for sample in reader.iter_samples(shard, SampleFields())]
    assert [sample.index for sample in samples] == [index for shard in shards for index in range(len(shard.files))]
    assert [sample.image for sample in samples] == [make_image(number) for number in range(20)]


def test_an_added_or_deleted_file_changes_only_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "FILES_PER_SHARD", 8)
    monkeypatch.setattr(listing, "MAX_FILES_PER_SHARD", 32)
    for number in range(200):
        (tmp_path / f"m{number:03}.jpg").write_bytes(b"x")
    before = {shard.digest(): len(shard.files) for shard in listing.list_shards([str(tmp_path)])}
    assert 15 < len(before) < 40
    for name in ("a.jpg", "m050b.jpg", "m123.jpg", "z.jpg"):
        path = tmp_path / name
        if existed := path.exists():
            path.unlink()
        else:
            path.write_bytes(b"x")
        after = {shard.digest(): len(shard.files) for shard in listing.list_shards([str(tmp_path)])}
        assert len(before.keys() - after.keys()) <= 1
        assert sum(after.values()) == sum(before.values()) + (-1 if existed else 1)
        before = after
