"""Test that the selection equals that of DuckDB.

This holds for any pool and for any division of it into shard groups.
"""

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

CLASSES, CLASSES_KEPT = 7, 3
# The class that no image has.
EMPTY = 5
# Log-odds whose softmax is 1 in single precision. Some are far apart, and two differ in their last bit.
SATURATED = np.array([17.5, 30, np.nextafter(np.float32(30), np.float32(31)), 88, 103.9, np.inf], np.float32)


def random_pool(images: int, seed: int, levels: int = 6) -> list[tuple[int, int, float, int]]:
    """Return random rows (image, class, score, position).

    The frequencies of the classes follow Zipf's law.

    Args:
        images: The number of images.
        seed: Seeds the rows.
        levels: The number of different scores. A small number makes many ties, and 0 takes the saturated scores.
    """
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, CLASSES + 1) ** 2
    weights[EMPTY] = 0
    rows = []
    for image in range(images):
        labels = rng.choice(CLASSES, CLASSES_KEPT, replace=False, p=weights / weights.sum())
        drawn = rng.integers(0, levels, CLASSES_KEPT) / 2 if levels else rng.choice(SATURATED, CLASSES_KEPT)
        values = np.sort(drawn)[::-1]
        rows += [(image, int(labels[position]), float(values[position]), position) for position in range(CLASSES_KEPT)]
    return rows


def write_score_files(
    rows: list[tuple[int, int, float, int]], num_groups: int, seed: int, folder: Path
) -> list[ScoreFileReader]:
    """Write the score files of shard groups.

    Shards of ten images each are assigned to the shard groups at random.
    """
    rng = np.random.default_rng(seed)
    group_of_shard = rng.integers(0, num_groups, 1 + max(row[0] for row in rows) // 10)
    score_files = []
    for group in range(num_groups):
        shards = [int(shard) for shard in np.flatnonzero(group_of_shard == group)]
        names = [f"shard-{shard}.tar" for shard in shards]
        group_rows = [row for row in rows if row[0] // 10 in shards]
        sample = np.array([shards.index(row[0] // 10) << 32 | row[0] % 10 for row in group_rows], np.uint64)
        columns = ScoreRows(
            np.array([row[1] for row in group_rows], np.uint16),
            np.array([row[2] for row in group_rows], np.float32),
            sample,
            np.array([row[3] for row in group_rows], np.uint8),
            score_file.tie_breakers(sample, names) if group_rows else np.empty(0, np.uint64),
        )
        path = folder / f"{num_groups}-{group}.parquet"
        path.write_bytes(
            score_file.write_score_file(
                score_file.sort_into_bands(columns, 2), CLASSES, {"teacher": "t", "unit": "u", "shards": names}
            )
        )
        score_files.append(ScoreFileReader(str(path)))
    return score_files


def identities(winners: Candidates, score_files: list[ScoreFileReader]) -> list[tuple[int, float, str, int]]:
    """Return (class, score, shard name, index) of every winner in order.

    These do not depend on the division into shard groups.
    """
    rows = winners.rows
    return [
        (int(label), float(score), score_files[group].shard_names[int(sample) >> 32], int(sample) & 0xFFFFFFFF)
        for label, score, sample, group in zip(rows.label, rows.score, rows.sample, winners.group, strict=True)
    ]


def select_with_duckdb(
    rows: list[tuple[int, int, float, int]], images_per_class: int, classes_per_image: int
) -> list[tuple[int, float, str, int]]:
    """Select with DuckDB from a table of all rows."""
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
def test_selection_equals_duckdb_for_any_shard_groups(
    tmp_path: Path, seed: int, levels: int, images_per_class: int, classes_per_image: int
) -> None:
    rows = random_pool(120, seed, levels)
    expected = select_with_duckdb(rows, images_per_class, classes_per_image)
    counts = Counter(label for label, *_ in expected)
    assert EMPTY not in counts
    assert images_per_class < 40 or min(counts.values()) < images_per_class, "a class is short"
    for num_groups in (1, 3, 8):
        score_files = write_score_files(rows, num_groups, seed, tmp_path)
        winners = select_top_k(score_files, CLASSES, images_per_class, classes_per_image)
        assert identities(winners, score_files) == expected


def test_frequent_pruning_does_not_change_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_pool(300, 1)
    expected = select_with_duckdb(rows, 5, 3)
    prunings = []

    def count_and_prune(*arguments: Any) -> Any:
        prunings.append(arguments)
        return prune(*arguments)

    monkeypatch.setattr(selecting, "MAX_CANDIDATE_ROWS", 10)
    monkeypatch.setattr(selecting, "prune", count_and_prune)
    score_files = write_score_files(rows, 8, 0, tmp_path)
    assert identities(select_top_k(score_files, CLASSES, 5, 3), score_files) == expected
    assert len(prunings) > 4


def count_rows_read(score_files: list[ScoreFileReader], images_per_class: int, classes_per_image: int) -> int:
    """Select, and return the number of rows that were read."""
    counts = []

    class CountingReader(ScoreFileReader):
        def read_next_band(self) -> ScoreRows:
            rows = super().read_next_band()
            counts.append(len(rows))
            return rows

    select_top_k([CountingReader(file.uri) for file in score_files], CLASSES, images_per_class, classes_per_image)
    return sum(counts)


def test_rows_that_cannot_win_are_not_read(tmp_path: Path) -> None:
    score_files = write_score_files(random_pool(3000, 2, levels=10**6), 4, 0, tmp_path)
    assert count_rows_read(score_files, 3, CLASSES_KEPT) < 0.1 * 3000 * CLASSES_KEPT


def test_a_short_class_is_not_searched_for_below_the_allowed_positions(tmp_path: Path) -> None:
    # Class 1 is the best class of three images and the second of all others.
    rows = [(image, int(image < 3), 9 - image / 1000, 0) for image in range(2000)]
    rows += [(image, int(image >= 3), -image / 1000, 1) for image in range(2000)]
    score_files = write_score_files(rows, 4, 0, tmp_path)
    assert identities(select_top_k(score_files, CLASSES, 10, 1), score_files) == select_with_duckdb(rows, 10, 1)
    assert count_rows_read(score_files, 10, 1) < 200
    assert count_rows_read(score_files, 10_000, 2) == 4000


def test_random_images_have_their_best_class_and_do_not_depend_on_the_shard_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_pool(200, 3)
    best_class = {
        (f"shard-{image // 10}.tar", image % 10): label for image, label, _, position in rows if position == 0
    }
    drawn = []
    for num_groups, max_rows in ((1, 10**6), (5, 10)):
        monkeypatch.setattr(selecting, "MAX_CANDIDATE_ROWS", max_rows)
        score_files = write_score_files(rows, num_groups, 0, tmp_path)
        drawn.append(identities(select_random(score_files, 50, seed=7), score_files))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 50
    assert all(best_class[shard, index] == label for label, _, shard, index in drawn[0])
