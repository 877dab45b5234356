"""The selection equals the slow obvious one, whatever the pool looks like and however it is cut into units."""

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from semiscale.scores import score_file
from semiscale.scores.score_file import ScoreFileReader, ScoreRows
from semiscale.stages.merge import top_k as selecting
from semiscale.stages.merge.top_k import Candidates, prune, select_random, select_top_k

CLASSES, KEPT = 7, 3
EMPTY = 5  # the class that no image has
# Log-odds whose softmax is 1 in single precision: far apart, equal, and neighbours that differ in their last bit.
SATURATED = np.array([17.5, 30, np.nextafter(np.float32(30), np.float32(31)), 88, 103.9, np.inf], np.float32)


def pool(images: int, seed: int, levels: int = 6) -> list[tuple[int, int, float, int]]:
    """Return (image, class, score, position) with Zipf classes; few levels of scores make heavy ties, 0 saturation."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, CLASSES + 1) ** 2
    weights[EMPTY] = 0
    rows = []
    for image in range(images):
        labels = rng.choice(CLASSES, KEPT, replace=False, p=weights / weights.sum())
        drawn = rng.integers(0, levels, KEPT) / 2 if levels else rng.choice(SATURATED, KEPT)
        values = np.sort(drawn)[::-1]
        rows += [(image, int(labels[place]), float(values[place]), place) for place in range(KEPT)]
    return rows


def units_of(rows: list[tuple[int, int, float, int]], cuts: int, seed: int, folder: Path) -> list[ScoreFileReader]:
    """Cut the images into shards of their own names, deal those to units at random, and write the units' files."""
    rng = np.random.default_rng(seed)
    dealt = rng.integers(0, cuts, 1 + max(row[0] for row in rows) // 10)
    units = []
    for unit in range(cuts):
        shards = [int(shard) for shard in np.flatnonzero(dealt == unit)]
        names = [f"shard-{shard}.tar" for shard in shards]
        mine = [row for row in rows if row[0] // 10 in shards]
        sample = np.array([shards.index(row[0] // 10) << 32 | row[0] % 10 for row in mine], np.uint64)
        columns = ScoreRows(
            np.array([row[1] for row in mine], np.uint16),
            np.array([row[2] for row in mine], np.float32),
            sample,
            np.array([row[3] for row in mine], np.uint8),
            score_file.tie_breakers(sample, names) if mine else np.empty(0, np.uint64),
        )
        path = folder / f"{cuts}-{unit}.parquet"
        path.write_bytes(
            score_file.write_score_file(
                score_file.sort_into_bands(columns, 2), CLASSES, {"teacher": "t", "unit": "u", "shards": names}
            )
        )
        units.append(ScoreFileReader(str(path)))
    return units


def identities(found: Candidates, units: list[ScoreFileReader]) -> list[tuple[int, float, str, int]]:
    """Return (class, score, shard name, index) of every winner in order: what must not depend on the units."""
    rows = found.rows
    return [
        (int(label), float(score), units[unit].shard_names[int(sample) >> 32], int(sample) & 0xFFFFFFFF)
        for label, score, sample, unit in zip(rows.label, rows.score, rows.sample, found.unit, strict=True)
    ]


def by_duckdb(
    rows: list[tuple[int, int, float, int]], images_per_class: int, classes_per_image: int
) -> list[tuple[int, float, str, int]]:
    """The same question to DuckDB, over a plain table of all rows."""
    table = [
        (label, score, f"shard-{image // 10}.tar", image % 10, position,
         int(score_file.tie_breakers(np.array([image % 10], np.uint64), [f"shard-{image // 10}.tar"])[0]))
        for image, label, score, position in rows
    ]  # fmt: skip
    with duckdb.connect() as connection:
        connection.execute(
            "create table rows (class int, score float, shard varchar, index int, position int, tie ubigint)"
        )
        connection.executemany("insert into rows values (?, ?, ?, ?, ?, ?)", table)
        return connection.execute(
            f"""select class, score, shard, index from rows where position < {classes_per_image}
                qualify row_number() over (partition by class order by score desc, tie) <= {images_per_class}
                order by class, score desc, tie"""
        ).fetchall()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [6, 0, 10**6], ids=["heavy ties", "saturated", "hardly a tie"])
@pytest.mark.parametrize(("images_per_class", "classes_per_image"), [(1, 1), (5, 2), (40, 3), (1000, 3)])
def test_equal_to_duckdb_for_any_units(
    tmp_path: Path, seed: int, levels: int, images_per_class: int, classes_per_image: int
) -> None:
    rows = pool(120, seed, levels)
    expected = by_duckdb(rows, images_per_class, classes_per_image)
    found_of = Counter(label for label, *_ in expected)
    assert EMPTY not in found_of
    assert images_per_class < 40 or min(found_of.values()) < images_per_class, "a class is short"
    for cuts in (1, 3, 8):
        units = units_of(rows, cuts, seed, tmp_path)
        found = select_top_k(units, CLASSES, images_per_class, classes_per_image)
        assert identities(found, units) == expected


def test_pruning_often_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pool(300, 1)
    expected = by_duckdb(rows, 5, 3)
    prunings = []

    def counted(*arguments: Any) -> Any:
        prunings.append(arguments)
        return prune(*arguments)

    monkeypatch.setattr(selecting, "MAX_CANDIDATE_ROWS", 10)
    monkeypatch.setattr(selecting, "prune", counted)
    units = units_of(rows, 8, 0, tmp_path)
    assert identities(select_top_k(units, CLASSES, 5, 3), units) == expected
    assert len(prunings) > 4


def rows_read(units: list[ScoreFileReader], images_per_class: int, classes_per_image: int) -> int:
    """Select, and return how many rows were read for it."""
    counts = []

    class Counted(ScoreFileReader):
        def read_next_band(self) -> ScoreRows:
            rows = super().read_next_band()
            counts.append(len(rows))
            return rows

    select_top_k([Counted(unit.uri) for unit in units], CLASSES, images_per_class, classes_per_image)
    return sum(counts)


def test_it_leaves_unread_what_cannot_win(tmp_path: Path) -> None:
    units = units_of(pool(3000, 2, levels=10**6), 4, 0, tmp_path)
    assert rows_read(units, 3, KEPT) < 0.1 * 3000 * KEPT


def test_a_class_that_is_short_among_first_choices_is_not_searched_for_among_the_others(tmp_path: Path) -> None:
    """Class 1 is the first choice of three images and the second of all the rest."""
    rows = [(image, int(image < 3), 9 - image / 1000, 0) for image in range(2000)]
    rows += [(image, int(image >= 3), -image / 1000, 1) for image in range(2000)]
    units = units_of(rows, 4, 0, tmp_path)
    assert identities(select_top_k(units, CLASSES, 10, 1), units) == by_duckdb(rows, 10, 1)
    assert rows_read(units, 10, 1) < 200
    assert rows_read(units, 10_000, 2) == 4000


def test_random_images_are_first_choices_and_do_not_depend_on_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pool(200, 3)
    first = {(f"shard-{image // 10}.tar", image % 10): label for image, label, _, place in rows if place == 0}
    found = []
    for cuts, prune_rows in ((1, 10**6), (5, 10)):
        monkeypatch.setattr(selecting, "MAX_CANDIDATE_ROWS", prune_rows)
        units = units_of(rows, cuts, 0, tmp_path)
        found.append(identities(select_random(units, 50, seed=7), units))
    assert found[0] == found[1]
    assert len(found[0]) == 50
    assert all(first[shard, index] == label for label, _, shard, index in found[0])
