"""Test that split Parquet files give the same results as whole files."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.data import listing, parquet_reader, reader
from semiscale.data.shard import SampleFields, Shard
from semiscale.stages.plan import shard_groups
from tests.support import sample_images
from tests.support.stages import Stages

NO_LABELS = SampleFields(label="")


def write_file(path: Path, rows: int, group: int, keys: bool = False) -> Path:
    """Write images in row groups of a given number of rows."""
    columns: dict[str, list[object]] = {
        "image": [sample_images.draw_png(row % 4 - 1, 1000 + row) for row in range(rows)]
    }
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({**columns, "key": [f"k{row}" for row in range(rows)]} if keys else columns),
        path,
        row_group_size=group,
    )
    return path


def split_file(path: Path) -> tuple[Shard, list[Shard]]:
    """Return the shard of a whole file and the shards of its slices."""
    (whole,) = listing.list_shards([str(path)])
    return whole, parquet_reader.split_by_row_groups(whole)


@pytest.fixture(autouse=True)
def _lower_row_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split files of more than 20 rows."""
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 20)
    monkeypatch.setattr(parquet_reader, "MIN_SPLIT_FILE_BYTES", 0)


@pytest.mark.parametrize(
    ("rows", "group", "expected"),
    [(50, 7, [(0, 14), (14, 28), (28, 42), (42, 50)]), (50, 20, [(0, 20), (20, 40), (40, 50)]),
     (50, 30, [(0, 30), (30, 50)]), (20, 7, [None]), (50, 50, [None]), (0, 5, [None])],
)  # fmt: skip
def test_slices_join_row_groups_up_to_the_limit(
    tmp_path: Path, rows: int, group: int, expected: list[tuple[int, int] | None]
) -> None:
    assert [part.rows for part in split_file(write_file(tmp_path / "a.parquet", rows, group))[1]] == expected


@pytest.mark.parametrize("keys", [False, True])
def test_slices_have_all_samples_of_the_file(tmp_path: Path, keys: bool) -> None:
    whole, parts = split_file(write_file(tmp_path / "a.parquet", 50, 7, keys))
    assert len({part.digest() for part in [whole, *parts]}) == len({part.name for part in [whole, *parts]}) == 5
    assert sum(part.size_bytes for part in parts) == whole.size_bytes
    assert [reader.estimate_sample_count(part, NO_LABELS) for part in parts] == [14, 14, 14, 8]
    samples = [list(reader.iter_samples(part, NO_LABELS)) for part in parts]
    assert [(sample.key, sample.image) for part in samples for sample in part] == [
        (sample.key, sample.image) for sample in reader.iter_samples(whole, NO_LABELS)
    ]
    assert [[sample.index for sample in part] for part in samples] == [list(range(len(part))) for part in samples]
    for part, expected in zip(parts, samples, strict=True):
        assert list(parquet_reader.read_samples_at(part, [7, 0], NO_LABELS)) == [expected[0], expected[7]]


def test_a_small_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MIN_SPLIT_FILE_BYTES", 10**6)
    (tmp_path / "a.parquet").write_bytes(b"not Parquet")
    (whole,) = listing.list_shards([str(tmp_path)])
    assert parquet_reader.split_by_row_groups(whole) == [whole]


def test_a_file_that_was_whole_in_an_earlier_plan_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, workdir = str(write_file(tmp_path / "pool" / "a.parquet", 50, 7).parent), str(tmp_path / "work")

    def plan_names(workdir: str) -> list[str]:
        return sorted(
            shard.name
            for group in shard_groups.build_shard_groups([pool], workdir, NO_LABELS)
            for shard in group.shards
        )

    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 1000)
    assert plan_names(workdir) == ["a.parquet"]
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 20)
    write_file(tmp_path / "pool" / "b.parquet", 30, 15)
    expected = ["a.parquet", "b.parquet from row 0", "b.parquet from row 15"]
    assert plan_names(workdir) == expected
    assert plan_names(workdir) == expected, "a second plan must list the same shards"


def test_a_large_shard_that_cannot_be_split_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shard_groups, "MAX_IMAGES_PER_RANKING", 60)
    for folder, count in (("small", 20), ("large", 70)):
        pool = tmp_path / folder
        sample_images.write_tar(
            pool / "a.tar", {f"{number}.png": sample_images.draw_png(0, number) for number in range(count)}
        )
        shard_groups.build_shard_groups([str(pool)], str(tmp_path / "work"), NO_LABELS)
        output = capsys.readouterr().out
        assert (f"{pool}/a.tar: the shard has about " in output) == (count > 60)


def test_a_split_file_is_scored_merged_and_packed_as_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = str(write_file(tmp_path / "pool" / "a.parquet", 120, 7).parent)
    split = Stages(tmp_path / "pieces", unlabeled=[pool], images_per_class=20)
    assert (split.plan.shards, split.unscored.pods) == (9, 2)
    monkeypatch.setattr(parquet_reader, "MAX_ROWS_PER_SHARD", 1000)
    whole = Stages(tmp_path / "whole", unlabeled=[pool], images_per_class=20)
    whole.__dict__["teacher"] = split.teacher
    assert (whole.plan.shards, whole.unscored.pods) == (1, 1)
    assert split.selection.ledger == whole.selection.ledger
    split_rows, whole_rows = (
        sorted((row["class"], row["score"], row["key"]) for row in stages.selection_rows()) for stages in (split, whole)
    )
    assert len(split_rows) == 60
    assert split_rows == whole_rows
    assert read_packed(split) == read_packed(whole)


def read_packed(stages: Stages) -> list[bytes]:
    """Return the packed labels and images in sorted order."""
    samples = []
    for entry in storage.list_objects(stages.packed.folder):
        if entry.uri.endswith(".tar"):
            with tarfile.open(entry.uri) as tar:
                data = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
            samples += [label + b" " + image for label, image in zip(data[::2], data[1::2], strict=True)]
    return sorted(samples)
