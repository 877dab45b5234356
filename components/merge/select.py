"""The exact top K of every class over all units, reading what can win.

The threshold algorithm (Fagin's; its distributed form TPUT; see also arXiv:1502.03942) on rank-banded files: read the
first band of every unit, take each class's K-th best score so far as its threshold, and read a unit's next band only
while some class has rows left there and the last one read is not below its threshold. What was not read cannot win:
its scores are at most that last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.shared.scores import Rows, UnitScores, ranked, ranks

PRUNE_ROWS = 8_000_000  # candidates are cut back to K a class whenever so many have gathered: bounds memory


@dataclass(frozen=True)
class Candidates:
    """Rows that may win, with the unit (by position) that each lies in."""

    rows: Rows
    unit: NDArray[np.int32]

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "Candidates":
        """Return the candidates at these places, or where this mask is true."""
        return Candidates(self.rows.take(chosen), self.unit[chosen])


def select(units: Sequence[UnitScores], classes: int, images_per_class: int, classes_per_image: int) -> Candidates:
    """Return the K best rows of each class among each image's P best classes, sorted by class and rank.

    Equal to sorting all rows by (class, score descending, tie) and cutting each class at K. Memory: PRUNE_ROWS + K x
    classes rows of 27 bytes, whatever the pool. Reads: the winners' bands, at worst all of them.
    """
    kept: list[Candidates] = []
    best = concatenated([])
    thresholds = np.full(classes, -np.inf, np.float32)
    unread = list(range(len(units)))
    while unread:
        for number in unread:
            rows = units[number].read_band() if units[number].remaining().any() else None
            if rows is None:
                continue
            eligible = (rows.position < classes_per_image) & (rows.score >= thresholds[rows.label])
            kept.append(Candidates(rows.take(eligible), np.full(int(eligible.sum()), number, np.int32)))
            if sum(len(part.rows) for part in kept) > PRUNE_ROWS:
                best, thresholds = pruned(best, kept, classes, images_per_class)
        best, thresholds = pruned(best, kept, classes, images_per_class)
        unread = [number for number in unread if may_win(units[number], thresholds)]
    return best


def may_win(unit: UnitScores, thresholds: NDArray[np.float32]) -> bool:
    """Say whether an unread row of a unit could reach a threshold; equal scores may, by their ties."""
    return bool(((unit.remaining() > 0) & (unit.last_scores >= thresholds)).any())


def pruned(
    best: Candidates, kept: list[Candidates], classes: int, images_per_class: int
) -> tuple[Candidates, NDArray[np.float32]]:
    """Cut the candidates back to K a class; returns them, sorted, and each class's K-th score (-inf where short).

    Empties `kept`.
    """
    merged = concatenated([best, *kept])
    kept.clear()
    # Sort a copy whose samples are the rows' places, to carry the units along.
    places = np.arange(len(merged.rows), dtype=np.uint64)
    rows = merged.rows
    order = ranked(Rows(rows.label, rows.score, places, rows.position, rows.tie)).sample.astype(np.int64)
    merged = merged.take(order)
    rank, counts = ranks(merged.rows.label, classes)
    merged = merged.take(rank < images_per_class)
    thresholds = np.full(classes, -np.inf, np.float32)
    full = counts >= images_per_class
    ends = np.cumsum(np.minimum(counts, images_per_class))
    thresholds[full] = merged.rows.score[ends[full] - 1]
    return merged, thresholds


def at_random(units: Sequence[UnitScores], images: int, seed: int) -> Candidates:
    """Return so many images of the pool, picked uniformly, each in the one class that the teacher puts first.

    The control for the ranking: as many images, no choice among them. Reads all rows: the cost of a scan of the scores.
    """
    kept = concatenated([])
    for number, unit in enumerate(units):
        while unit.remaining().any():
            rows = unit.read_band()
            first = rows.take(rows.position == 0)
            kept = concatenated([kept, Candidates(first, np.full(len(first), number, np.int32))])
            lots = (kept.rows.tie ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
            kept = kept.take(np.sort(np.argsort(lots, kind="stable")[:images]))
    best, _ = pruned(kept, [], len(units[0].last_scores), images)
    return best


def concatenated(parts: list[Candidates]) -> Candidates:
    """Put candidates one after the other."""

    def column(name: str, kind: str) -> NDArray[np.generic]:
        return np.concatenate([np.empty(0, kind), *(getattr(part.rows, name) for part in parts)])

    kinds = {"label": "u2", "score": "f4", "sample": "u8", "position": "u1", "tie": "u8"}
    rows = Rows(**{name: column(name, kind) for name, kind in kinds.items()})  # type: ignore[arg-type]
    return Candidates(rows, np.concatenate([np.empty(0, np.int32), *(part.unit for part in parts)]))
