"""The exact top K of every class over all units, reading what can win.

The threshold algorithm (Fagin's; its distributed form TPUT; see also arXiv:1502.03942) on rank-banded files: read the
first band of every unit, take each class's K-th best score so far as its threshold, and read a unit's next band only
while some class has rows left there and the last one read is not below its threshold. What was not read cannot win:
its scores are at most that last one.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiscale.scores.score_file import ScoreFileReader, ScoreRows, argsort_best_per_class, class_offsets

MAX_CONCURRENT_READS = 32  # threads, each with one band in memory: hides an object store's latency
MAX_CANDIDATE_ROWS = (
    8_000_000  # candidates are cut back to K a class above this, and above twice K a class: bounds memory
)

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """Rows that may win, with the unit (by position) that each lies in."""

    rows: ScoreRows
    unit: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.unit)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "Candidates":
        """Return the candidates at these places, or where this mask is true."""
        return Candidates(self.rows.take(chosen), self.unit[chosen])


def select_top_k(
    units: Sequence[ScoreFileReader],
    classes: int,
    images_per_class: int,
    classes_per_image: int,
    least: float = -np.inf,
) -> Candidates:
    """Return the K best rows of each class among each image's P best classes, sorted by class and rank.

    Rows that score below `least` are left out.

    Equal to sorting all rows by (class, score descending, tie) and cutting each class at K. Memory: PRUNE_ROWS or
    2 x K x classes rows of 28 bytes, three times, whatever the pool. Reads: the winners' bands, at worst all.
    """
    best, thresholds = concat([]), np.full(classes, least, np.float32)
    most = max(MAX_CANDIDATE_ROWS, 2 * classes * images_per_class)
    waiting = list(range(len(units)))
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        while waiting := [number for number in waiting if can_still_win(units[number], thresholds, classes_per_image)]:
            gathered: list[Candidates] = []
            for found in read_next_bands(pool, units, waiting, classes_per_image):
                gathered.append(found.take(found.rows.score >= thresholds[found.rows.label]))
                if len(best) + sum(map(len, gathered)) > most:
                    best, thresholds = prune([best, *gathered], thresholds, images_per_class)
                    gathered = []
            best, thresholds = prune([best, *gathered], thresholds, images_per_class)
    return best


def can_still_win(unit: ScoreFileReader, thresholds: F32, classes_per_image: int) -> bool:
    """Say whether an unread row of a unit could reach a threshold; equal scores may, by their ties."""
    return bool((unit.has_unread_rows(classes_per_image) & (unit.last_scores >= thresholds)).any())


def read_next_bands(
    pool: ThreadPoolExecutor, units: Sequence[ScoreFileReader], numbers: list[int], classes_per_image: int
) -> Iterator[Candidates]:
    """Read the next band of each of these units, READERS at a time; yields its rows of each image's P best classes."""

    def read(number: int) -> Candidates:
        rows = units[number].read_next_band()
        rows = rows.take(rows.position < classes_per_image)
        return Candidates(rows, np.full(len(rows), number, np.int32))

    for start in range(0, len(numbers), MAX_CONCURRENT_READS):
        yield from pool.map(read, numbers[start : start + MAX_CONCURRENT_READS])


def prune(parts: list[Candidates], thresholds: F32, images_per_class: int) -> tuple[Candidates, F32]:
    """Cut the candidates back to K a class; returns them, sorted, and the thresholds, raised to each K-th score."""
    merged = concat(parts)
    best = merged.take(argsort_best_per_class(merged.rows, images_per_class))
    edges = np.array(class_offsets(best.rows.label, len(thresholds)))
    full = np.diff(edges) == images_per_class
    raised = thresholds.copy()
    raised[full] = best.rows.score[edges[1:][full] - 1]
    return best, raised


def select_random(units: Sequence[ScoreFileReader], images: int, seed: int) -> Candidates:
    """Return so many images of the pool, picked uniformly, each in the one class that the teacher puts first.

    The control for the ranking: as many images, no choice among them. Reads the bands that have first choices: at
    worst the cost of a scan of the scores. Memory: 2 x (PRUNE_ROWS + the images) rows.
    """
    drawn, gathered = concat([]), list[Candidates]()
    waiting = list(range(len(units)))
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        while waiting := [number for number in waiting if units[number].has_unread_rows(1).any()]:
            for found in read_next_bands(pool, units, waiting, 1):
                gathered.append(found)
                if sum(map(len, gathered)) > max(MAX_CANDIDATE_ROWS, images):
                    drawn, gathered = sample_by_hash([drawn, *gathered], images, seed), []
    drawn = sample_by_hash([drawn, *gathered], images, seed)
    return drawn.take(argsort_best_per_class(drawn.rows))


def sample_by_hash(parts: list[Candidates], images: int, seed: int) -> Candidates:
    """Let every image draw a lot by its identity and the seed, and return those with the lowest."""
    merged = concat(parts)
    if len(merged) <= images:
        return merged
    lots = (merged.rows.tie ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return merged.take(np.argpartition(lots, images)[:images])


def concat(parts: list[Candidates]) -> Candidates:
    """Put candidates one after the other."""

    def column(name: str, kind: str) -> NDArray[np.generic]:
        return np.concatenate([np.empty(0, kind), *(getattr(part.rows, name) for part in parts)])

    kinds = {"label": "u2", "score": "f4", "sample": "u8", "position": "u1", "tie": "u8"}
    rows = ScoreRows(**{name: column(name, kind) for name, kind in kinds.items()})  # type: ignore[arg-type]
    return Candidates(rows, np.concatenate([np.empty(0, np.int32), *(part.unit for part in parts)]))
