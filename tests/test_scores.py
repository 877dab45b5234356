"""The banded score file: what is written can be read back, band by band, in the order that the merge relies on."""

from pathlib import Path

import numpy as np
import pytest

from components.shared import scores
from components.shared.errors import Refused
from components.shared.scores import Rows, UnitScores

CLASSES = 5


def some_rows(count: int, seed: int = 0) -> Rows:
    """Rows with heavy ties in a Zipf class distribution, one class empty."""
    rng = np.random.default_rng(seed)
    label = np.minimum(rng.zipf(1.5, count) - 1, CLASSES - 2).astype(np.uint16)
    sample = scores.sample_codes(0, np.arange(count))
    tie = scores.ties(sample, ["a.tar"])
    score = rng.integers(-3, 3, count).astype(np.float32)
    return Rows(label, score, sample, np.zeros(count, np.uint8), tie)


def written(rows: Rows, folder: Path, head: int) -> UnitScores:
    """Write a unit's file and open it."""
    path = folder / "scores.parquet"
    metadata = {"teacher": "t", "unit": "u", "shards": ["a.tar"]}
    path.write_bytes(scores.encode(rows, CLASSES, head, metadata))
    return UnitScores(str(path))


def test_bands_hold_the_ranks_in_order(tmp_path: Path) -> None:
    rows, head = some_rows(1000), 8
    unit = written(rows, tmp_path, head)
    slow = sorted(range(1000), key=lambda row: (rows.label[row], -rows.score[row], rows.tie[row]))
    expected = {label: [rows.sample[row] for row in slow if rows.label[row] == label] for label in range(CLASSES)}
    start, end = 0, head
    while unit.unread(1).any():
        band = unit.read_band()
        for label in range(CLASSES):
            assert band.sample[band.label == label].tolist() == expected[label][start:end]
        assert unit.remaining().tolist() == [max(len(expected[label]) - end, 0) for label in range(CLASSES)]
        start, end = end, 2 * end
    assert end >= 1000


def test_last_scores_bound_what_follows(tmp_path: Path) -> None:
    unit = written(some_rows(500), tmp_path, 4)
    unit.read_band()
    bound = unit.last_scores.copy()
    following = unit.read_band()
    assert (following.score <= bound[following.label]).all()


def test_ties_depend_on_the_shards_name_alone() -> None:
    names = ["a.tar", "b.tar"]
    both = scores.ties(np.array([3, (1 << 32) | 3], np.uint64), names)
    assert both[0] != both[1]
    assert both[1] == scores.ties(np.array([3], np.uint64), ["b.tar"])[0]


def test_scores_sort_as_floats_do() -> None:
    values = np.array([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 7, np.inf], np.float32)
    rows = Rows(*(np.zeros(8, kind) for kind in ("u2", "f4", "u8", "u1", "u8")))
    shuffled = Rows(rows.label, values[[3, 7, 0, 5, 2, 6, 1, 4]], rows.sample, rows.position, rows.tie)
    assert scores.ranked(shuffled).score.tolist() == sorted(values.tolist(), reverse=True)


@pytest.mark.parametrize(("images_per_class", "units", "head"), [(16_000, 1000, 32), (1600, 1000, 8), (1, 1000, 1)])
def test_head_size(images_per_class: int, units: int, head: int) -> None:
    assert scores.head_size(images_per_class, units) == head


def test_a_unit_without_an_image_is_a_file_too(tmp_path: Path) -> None:
    nothing = some_rows(10).take(np.zeros(10, bool))
    unit = written(nothing, tmp_path, 4)
    assert not unit.remaining().any()


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(Refused, match=r"other\.parquet: not a score file"):
        UnitScores(str(tmp_path / "other.parquet"))
