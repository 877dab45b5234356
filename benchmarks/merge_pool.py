"""Draw and write the synthetic pool of the merge benchmark.

The pool has 1000 classes and 10 scored classes an image. The first choices follow Zipf's law. The domain of the classes
contains 35 % of the images, and the teacher is over-confident on them. The pool is stored twice: as score files of
shard groups, and as plain Parquet files of (id, class, score). The full pool has score files only, and in them only
the best ranks.
"""

import functools
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.scores import score_file
from semiscale.scores.score_file import ScoreRows

FOLDER = Path("runs/bench")
CLASSES, CLASSES_PER_IMAGE = 1000, 10
IN_DOMAIN_FRACTION = 0.35
IMAGES_PER_SHARD = 10_000
# Images that are drawn at the same time.
IMAGES_PER_DRAW = 10**6
# The full pool has only these bands in its files. The merge never needs more of them.
BANDS_OF_FULL_POOL = 4
ZIPF_C = 1 / np.arange(1, CLASSES + 1) / (1 / np.arange(1, CLASSES + 1)).sum()


@dataclass(frozen=True)
class Pool:
    """A synthetic pool and the size of the selection.

    All rows follow from these numbers.
    """

    images: int
    images_per_class: int
    images_per_group: int
    full: bool = False

    @property
    def groups(self) -> int:
        """Return the number of shard groups."""
        return -(-self.images // self.images_per_group)

    @property
    def head(self) -> int:
        """Return the ranks of each class in band 0."""
        return score_file.first_band_size(self.images_per_class, self.groups)

    @property
    def folder(self) -> Path:
        """Return the folder of everything that belongs to the pool."""
        rows = self.images * CLASSES_PER_IMAGE
        return FOLDER / f"merge-{rows}-{self.images_per_group}{'-full' * self.full}"

    @property
    def banded(self) -> Path:
        """Return the folder of the score files. Their bands follow from K."""
        return self.folder / f"banded-{score_file.FORMAT}-{self.head}"

    @property
    def plain(self) -> Path:
        """Return the folder of the plain Parquet files."""
        return self.folder / "plain"

    def shard_names(self, group: int) -> list[str]:
        """Return the names of the shards of a shard group."""
        shards = -(-self.images_per_group // IMAGES_PER_SHARD)
        return [f"part-{group * shards + number:08}.tar" for number in range(shards)]

    def metadata(self, group: int) -> dict[str, Any]:
        """Return the metadata of a score file."""
        return {"teacher": "synthetic", "unit": str(group), "shards": self.shard_names(group)}


def write_pool(pool: Pool, write: Callable[[Pool, int], None]) -> None:
    """Write all shard groups that are not there yet.

    Other processes write, so this one stays small.

    Args:
        pool: The pool.
        write: `write_group` or `write_best_ranks`.

    Cost:
        Two shard groups are in memory, 6 GB each.
    """
    started = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 2)) as processes:
        list(processes.map(functools.partial(write, pool), range(pool.groups)))
    print(f"pool of {pool.images:,} images in {pool.folder}: {time.monotonic() - started:.0f} s", flush=True)


def write_group(pool: Pool, group: int) -> None:
    """Write those of the two files of a shard group that are not there yet."""
    banded, plain = (folder / f"{group:05}.parquet" for folder in (pool.banded, pool.plain))
    if banded.exists() and plain.exists():
        return
    rows = draw_group(pool, group)
    storage.write_bytes(
        str(banded),
        score_file.write_score_file(score_file.sort_into_bands(rows, pool.head), CLASSES, pool.metadata(group)),
    )
    ids = group * pool.images_per_group + np.arange(len(rows) // CLASSES_PER_IMAGE, dtype=np.uint64)
    buffer = io.BytesIO()
    table = pa.table({"id": np.repeat(ids, CLASSES_PER_IMAGE), "class": rows.label, "score": rows.score})
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(str(plain), buffer.getvalue())


def draw_group(pool: Pool, group: int) -> ScoreRows:
    """Draw the rows of one shard group, `IMAGES_PER_DRAW` images at a time."""
    images = min(pool.images_per_group, pool.images - group * pool.images_per_group)
    starts = range(0, images, IMAGES_PER_DRAW)
    draws = [draw_scores((1, group, start), min(IMAGES_PER_DRAW, images - start)) for start in starts]
    label_BP, score_BP = (np.concatenate(columns) for columns in zip(*draws, strict=True))
    codes = sample_codes(np.arange(len(label_BP)))
    return ScoreRows(
        label_BP.ravel(),
        score_BP.ravel(),
        np.repeat(codes, CLASSES_PER_IMAGE),
        np.tile(np.arange(CLASSES_PER_IMAGE, dtype=np.uint8), len(codes)),
        np.repeat(score_file.tie_breakers(codes, pool.shard_names(group)), CLASSES_PER_IMAGE),
    )


def draw_scores(seed: tuple[int, ...], images: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Draw label_BP and score_BP of images.

    The first choices follow Zipf's law. The other choices are spread over the classes.
    """
    rng = np.random.default_rng(seed)
    first_B = rng.choice(CLASSES, images, p=ZIPF_C)
    # Nine steps of at most 109 stay below 1000, so the classes of an image are distinct.
    steps_BP = np.cumsum(rng.integers(1, 110, (images, CLASSES_PER_IMAGE - 1)), axis=1)
    label_BP = np.column_stack([first_B, (first_B[:, None] + steps_BP) % CLASSES])
    in_domain_B = rng.random(images) < IN_DOMAIN_FRACTION
    best_B = np.where(in_domain_B, 4 + 3 * rng.standard_gamma(2, images), rng.normal(0, 2, images))
    # The other classes share the probability that the first choice leaves.
    second_B = np.minimum(best_B, -np.logaddexp(0, best_B))
    falls_BP = np.cumsum(rng.standard_exponential((images, CLASSES_PER_IMAGE - 1), np.float32), axis=1)
    score_BP = np.column_stack([best_B, second_B[:, None] - falls_BP])
    return label_BP.astype(np.uint16), score_BP.astype(np.float32)


def sample_codes(images: NDArray[np.int64]) -> score_file.U64:
    """Return the codes of images that are counted within their shard group."""
    shard, index = np.divmod(images.astype(np.uint64), np.uint64(IMAGES_PER_SHARD))
    return np.asarray(shard << np.uint64(32) | index)


def write_best_ranks(pool: Pool, group: int) -> None:
    """Write the first bands of one shard group, with a footer that lists all bands.

    It is an error to read further than the first bands.
    """
    path = pool.banded / f"{group:05}.parquet"
    if not path.exists():
        rows, counts = draw_best_ranks(pool, group)
        depths = np.tile(score_file.band_of_rank(counts - 1, pool.head) + 1, (CLASSES_PER_IMAGE, 1))
        metadata = {**pool.metadata(group), "depths": depths.tolist()}
        storage.write_bytes(
            str(path), score_file.write_score_file(score_file.sort_into_bands(rows, pool.head), CLASSES, metadata)
        )


def draw_best_ranks(pool: Pool, group: int) -> tuple[ScoreRows, NDArray[np.int64]]:
    """Draw the best ranks of one shard group directly, by the law of order statistics.

    Each class has two populations: first choices in the domain, and all other rows.

    Returns:
        The rows of the best ranks, and the number of all rows of each class.
    """
    rng = np.random.default_rng((2, group))
    images = pool.images_per_group
    in_domain = rng.poisson(IN_DOMAIN_FRACTION * images * ZIPF_C)
    others = rng.poisson(images * (CLASSES_PER_IMAGE - IN_DOMAIN_FRACTION) / CLASSES, CLASSES)
    ranks = written_ranks(pool.head)
    in_domain_scores = 4 + 3 * draw_largest_exponentials(rng, in_domain, ranks)
    other_scores = draw_largest_exponentials(rng, others, ranks) - 6
    score = -np.sort(-np.hstack([in_domain_scores, other_scores]), axis=1)[:, :ranks]
    codes = sample_codes(rng.integers(0, images, CLASSES * ranks))
    label = np.repeat(np.arange(CLASSES, dtype=np.uint16), ranks)
    position = (rng.geometric(0.7, len(label)) - 1).clip(max=CLASSES_PER_IMAGE - 1).astype(np.uint8)
    tie = score_file.tie_breakers(codes, pool.shard_names(group))
    return ScoreRows(label, score.astype(np.float32).ravel(), codes, position, tie), in_domain + others


def draw_largest_exponentials(rng: np.random.Generator, counts: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """Draw the largest values of exponential variables, in descending order.

    The i-th smallest of n uniform variables is the i-th arrival of a Poisson process over its (n + 1)-th.

    Args:
        rng: The source of random numbers.
        counts: The number of variables, for each class.
        ranks: The number of values, for each class. Missing values are -inf.
    """
    arrivals = np.cumsum(rng.standard_exponential((len(counts), ranks + 1)), axis=1)
    later = rng.standard_gamma(np.maximum(counts - ranks, 0))
    last = arrivals[np.arange(len(counts)), np.minimum(counts, ranks)] + later
    values = -np.log(arrivals[:, :ranks] / last[:, None])
    return np.where(np.arange(ranks) < counts[:, None], values, -np.inf)


def written_ranks(head: int) -> int:
    """Return the ranks of each class in the files of the full pool."""
    return int(np.searchsorted(score_file.band_of_rank(np.arange(100 * head), head), BANDS_OF_FULL_POOL))
