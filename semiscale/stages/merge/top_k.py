"""Select the exact top K of every class over the score files of all shard groups.

A score file stores its rows in bands, the best ranks of each class first. A diagram in `semiscale/scores/score_file.py`
shows them. The selection reads band by band. It is a threshold algorithm (Fagin, Lotem & Naor 2003) in its distributed
form, TPUT (Cao & Wang 2004), as in Hübschle-Schneider & Sanders (arXiv:1502.03942):

1. It reads the first band of every score file.
2. It keeps the K best rows of each class. The K-th best score becomes the threshold of the class. A class that has
   fewer rows keeps its old threshold, which begins at the lowest score that may be selected.
3. A score file can still win if a class has unread rows in it, and the last row read of this class reaches the
   threshold. The next band of every such file is read, and step 2 follows. Without such a file the selection is done.

The result is exact. The rows of a class descend in score, so an unread row scores at most as much as the last row that
was read. At the end this score is below the threshold of the class, which all selected rows reach. An unread row that
equals the threshold could win by its tie-breaker, so the algorithm reads on in this case.

Cost:
    Reads the bands that have winners, about 1.56 times the size of the winners in a pool of a billion images. In the
    worst case it reads all bands. Memory: `MAX_CANDIDATE_ROWS` or 2 K rows of each class, whichever is more, with 28
    bytes a row, three times. `MAX_CONCURRENT_READS` bands come on top. Neither grows with the pool.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiscale.scores.score_file import ScoreFileReader, ScoreRows, argsort_best_per_class, class_offsets

# Threads that read, to hide the latency of an object store. Each has one band in memory.
MAX_CONCURRENT_READS = 32
# Above this number of rows, and above twice K rows of each class, candidates are pruned to K of each class. This bounds
# the memory.
MAX_CANDIDATE_ROWS = 8_000_000

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """Rows that may win, with the number of the score file that has each."""

    rows: ScoreRows
    group: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.group)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "Candidates":
        """Return the candidates at these indexes, or those that this mask selects."""
        return Candidates(self.rows.take(chosen), self.group[chosen])


def select_top_k(
    score_files: Sequence[ScoreFileReader],
    classes: int,
    images_per_class: int,
    classes_per_image: int,
    min_score: float = -np.inf,
) -> Candidates:
    """Return the K best rows of each class, sorted by class and rank.

    The result equals a sort of all rows by class, descending score and tie-breaker, of which the first K rows of each
    class are taken.

    Args:
        score_files: The score files of all shard groups, unread.
        classes: The number of classes.
        images_per_class: K.
        classes_per_image: P. Only the P best classes of each image count.
        min_score: The lowest score that may be selected, in log-odds.

    Raises:
        SemiscaleError: A score file is missing or damaged.

    Cost:
        The docstring of this module states the bytes read and the memory.
    """
    best, thresholds = concat([]), np.full(classes, min_score, np.float32)
    max_rows = max(MAX_CANDIDATE_ROWS, 2 * classes * images_per_class)
    remaining = list(range(len(score_files)))
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        while remaining := [
            number for number in remaining if can_still_win(score_files[number], thresholds, classes_per_image)
        ]:
            gathered: list[Candidates] = []
            for band in read_next_bands(pool, score_files, remaining, classes_per_image):
                gathered.append(band.take(band.rows.score >= thresholds[band.rows.label]))
                if len(best) + sum(map(len, gathered)) > max_rows:
                    best, thresholds = prune([best, *gathered], thresholds, images_per_class)
                    gathered = []
            best, thresholds = prune([best, *gathered], thresholds, images_per_class)
    return best


def can_still_win(score_file: ScoreFileReader, thresholds: F32, classes_per_image: int) -> bool:
    """Return whether an unread row of a score file can reach its threshold.

    A row that equals the threshold counts, because its tie-breaker may be the better one.

    Args:
        score_file: The score file of a shard group.
        thresholds: The threshold of each class, in log-odds.
        classes_per_image: P.
    """
    return bool((score_file.has_unread_rows(classes_per_image) & (score_file.last_scores >= thresholds)).any())


def read_next_bands(
    pool: ThreadPoolExecutor, score_files: Sequence[ScoreFileReader], numbers: list[int], classes_per_image: int
) -> Iterator[Candidates]:
    """Read the next band of some score files and yield its rows.

    Args:
        pool: The threads that read.
        score_files: All score files.
        numbers: The numbers of the score files that are read.
        classes_per_image: P. Rows of further classes of an image are left out.

    Cost:
        Memory for `MAX_CONCURRENT_READS` bands.
    """

    def read(number: int) -> Candidates:
        rows = score_files[number].read_next_band()
        rows = rows.take(rows.position < classes_per_image)
        return Candidates(rows, np.full(len(rows), number, np.int32))

    # `map` starts all its calls at once, and would hold the bands of all score files.
    for start in range(0, len(numbers), MAX_CONCURRENT_READS):
        yield from pool.map(read, numbers[start : start + MAX_CONCURRENT_READS])


def prune(parts: list[Candidates], thresholds: F32, images_per_class: int) -> tuple[Candidates, F32]:
    """Keep the K best candidates of each class, and raise the thresholds.

    Args:
        parts: The candidates.
        thresholds: The threshold of each class, in log-odds.
        images_per_class: K.

    Returns:
        The remaining candidates, sorted by class and rank, and the new thresholds. The threshold of a class with K
        candidates is the score of the last.
    """
    merged = concat(parts)
    best = merged.take(argsort_best_per_class(merged.rows, images_per_class))
    offsets = np.array(class_offsets(best.rows.label, len(thresholds)))
    is_full = np.diff(offsets) == images_per_class
    raised = thresholds.copy()
    raised[is_full] = best.rows.score[offsets[1:][is_full] - 1]
    return best, raised


def select_random(score_files: Sequence[ScoreFileReader], images: int, seed: int) -> Candidates:
    """Return images of the pool that are drawn uniformly, each in its best class.

    This is the control experiment for the ranking. It selects as many images, but does not choose between them.

    Args:
        score_files: The score files of all shard groups, unread.
        images: The number of images.
        seed: Seeds the draw.

    Returns:
        The candidates, sorted by class and rank.

    Raises:
        SemiscaleError: A score file is missing or damaged.

    Cost:
        Reads the bands that have best classes, in the worst case all. Memory for 2 x (`MAX_CANDIDATE_ROWS` + `images`)
        rows of 28 bytes.
    """
    drawn, gathered = concat([]), list[Candidates]()
    remaining = list(range(len(score_files)))
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        while remaining := [number for number in remaining if score_files[number].has_unread_rows(1).any()]:
            for band in read_next_bands(pool, score_files, remaining, 1):
                gathered.append(band)
                if sum(map(len, gathered)) > max(MAX_CANDIDATE_ROWS, images):
                    drawn, gathered = sample_by_hash([drawn, *gathered], images, seed), []
    drawn = sample_by_hash([drawn, *gathered], images, seed)
    return drawn.take(argsort_best_per_class(drawn.rows))


def sample_by_hash(parts: list[Candidates], images: int, seed: int) -> Candidates:
    """Return the candidates with the lowest hashes of identity and seed.

    The choice does not depend on the parts, because the hash of a candidate is always the same.

    Args:
        parts: The candidates, one row for each image.
        images: The number of candidates to return, at most.
        seed: Seeds the hash.
    """
    merged = concat(parts)
    if len(merged) <= images:
        return merged
    hashes = (merged.rows.tie ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return merged.take(np.argpartition(hashes, images)[:images])


def concat(parts: list[Candidates]) -> Candidates:
    """Concatenate candidates."""

    def column(name: str, dtype: str) -> NDArray[np.generic]:
        # The empty array gives the dtype if there are no parts.
        return np.concatenate([np.empty(0, dtype), *(getattr(part.rows, name) for part in parts)])

    dtypes = {"label": "u2", "score": "f4", "sample": "u8", "position": "u1", "tie": "u8"}
    rows = ScoreRows(**{name: column(name, dtype) for name, dtype in dtypes.items()})  # type: ignore[arg-type]
    return Candidates(rows, np.concatenate([np.empty(0, np.int32), *(part.group for part in parts)]))
