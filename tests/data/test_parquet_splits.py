"""Parquet files of more rows than a pod should hold: cut between their row groups, scored and packed as if whole."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.data import listing, parquet_reader, reader
from semiscale.data.shard import SampleFields, Shard
from semiscale.stages.plan import shard_groups
from tests.support import pictures
from tests.support.stages import Stages

PLAIN = SampleFields(label="")


def write_file(path: Path, rows: int, group: int, keys: bool = False) -> Path:
    """Write images in row groups of so many."""
    columns: dict[str, list[object]] = {"image": [pictures.picture(row % 4 - 1, 1000 + row) for row in range(rows)]}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({**columns, "key": [f"k{row}" for row in range(rows)]} if keys else columns),
        path,
        row_group_size=group,
    )
    return path


def cut(path: Path) -> tuple[Shard, list[Shard]]:
    """Return a file as one shard and in slices."""
    (whole,) = listing.list_shards([str(path)])
    return whole, parquet_reader.split_by_row_groups(whole)


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 20)
    monkeypatch.setattr(parquet_reader, "MIN_SPLIT_FILE_BYTES", 0)


@pytest.mark.parametrize(
    ("rows", "group", "expected"),
    [(50, 7, [(0, 14), (14, 28), (28, 42), (42, 50)]), (50, 20, [(0, 20), (20, 40), (40, 50)]),
     (50, 30, [(0, 30), (30, 50)]), (20, 7, [None]), (50, 50, [None]), (0, 5, [None])],
)  # fmt: skip
def test_slices_are_row_groups_that_are_no_more_than_allowed_together(
    tmp_path: Path, rows: int, group: int, expected: list[tuple[int, int] | None]
) -> None:
    assert [one.rows for one in cut(write_file(tmp_path / "a.parquet", rows, group))[1]] == expected


@pytest.mark.parametrize("keys", [False, True])
def test_the_slices_of_a_file_are_the_file(tmp_path: Path, keys: bool) -> None:
    whole, parts = cut(write_file(tmp_path / "a.parquet", 50, 7, keys))
    assert len({part.digest() for part in [whole, *parts]}) == len({part.name for part in [whole, *parts]}) == 5
    assert sum(part.size_bytes for part in parts) == whole.size_bytes
    assert [reader.estimate_sample_count(part, PLAIN) for part in parts] == [14, 14, 14, 8]
    samples = [list(reader.iter_samples(part, PLAIN)) for part in parts]
    assert [(one.key, one.image) for part in samples for one in part] == [
        (one.key, one.image) for one in reader.iter_samples(whole, PLAIN)
    ]
    assert [[one.index for one in part] for part in samples] == [list(range(len(part))) for part in samples]
    for part, found in zip(parts, samples, strict=True):
        assert list(parquet_reader.read_samples_at(part, [7, 0], PLAIN)) == [found[0], found[7]]


def test_what_cannot_have_many_rows_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MIN_SPLIT_FILE_BYTES", 10**6)
    (tmp_path / "a.parquet").write_bytes(b"no Parquet at all")
    (whole,) = listing.list_shards([str(tmp_path)])
    assert parquet_reader.split_by_row_groups(whole) == [whole]


def test_a_file_that_an_earlier_plan_knows_whole_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, workdir = str(write_file(tmp_path / "pool" / "a.parquet", 50, 7).parent), str(tmp_path / "work")

    def names(at: str) -> list[str]:
        return sorted(
            shard.name for unit in shard_groups.build_shard_groups([pool], at, PLAIN) for shard in unit.shards
        )

    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 1000)
    assert names(workdir) == ["a.parquet"]
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 20)
    write_file(tmp_path / "pool" / "b.parquet", 30, 15)
    expected = ["a.parquet", "b.parquet from row 0", "b.parquet from row 15"]
    assert names(workdir) == expected
    assert names(workdir) == expected, "the same again"


def test_a_shard_that_cannot_be_cut_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shard_groups, "MAX_IMAGES_PER_RANKING", 60)
    for folder, count in (("small", 20), ("large", 70)):
        pool = tmp_path / folder
        pictures.write_tar(pool / "a.tar", {f"{number}.png": pictures.picture(0, number) for number in range(count)})
        shard_groups.build_shard_groups([str(pool)], str(tmp_path / "work"), PLAIN)
        said = capsys.readouterr().out
        assert (f"{pool}/a.tar: the shard has about " in said) == (count > 60)


def test_a_cut_file_is_scored_merged_and_packed_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = str(write_file(tmp_path / "pool" / "a.parquet", 120, 7).parent)
    pieces = Stages(tmp_path / "pieces", unlabeled=[pool], images_per_class=20)
    assert (pieces.plan.shards, pieces.unscored.pods) == (9, 2)
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 1000)
    whole = Stages(tmp_path / "whole", unlabeled=[pool], images_per_class=20)
    whole.__dict__["teacher"] = pieces.teacher
    assert (whole.plan.shards, whole.unscored.pods) == (1, 1)
    assert pieces.selection.ledger == whole.selection.ledger
    one, other = (
        sorted((row["class"], row["score"], row["key"]) for row in stages.selection_rows())
        for stages in (pieces, whole)
    )
    assert len(one) == 60
    assert one == other
    assert packed(pieces) == packed(whole)


def packed(stages: Stages) -> list[bytes]:
    """All images and labels that were packed."""
    found = []
    for entry in storage.list_objects(stages.packed.folder):
        if entry.uri.endswith(".tar"):
            with tarfile.open(entry.uri) as tar:
                data = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
            found += [label + b" " + image for label, image in zip(data[::2], data[1::2], strict=True)]
    return sorted(found)
