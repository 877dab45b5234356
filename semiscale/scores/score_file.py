"""Write and read the rank-banded score file of a shard group.

A row is (band, class, score, sample, position): the log-odds of one of the best classes of an image. Rows are sorted by
band, class, descending score and tie-breaker. Each band is one row group of a Parquet file. Band 0 has the first
`head` ranks of every class in the shard group, band 1 the next `head` / 4, and each further band twice as many as the
one before:

    row group   class 0              class 1              class 2
    band 0      ranks 0 .. h-1       ranks 0 .. h-1       ranks 0 .. h-1         h = head
    band 1      h .. 5/4 h - 1       h .. 5/4 h - 1       (no more rows)         h/4 ranks
    band 2      5/4 h .. 7/4 h - 1   5/4 h .. 7/4 h - 1                          h/2 ranks
    band 3      7/4 h .. 11/4 h - 1  (no more rows)                              h ranks
    footer      depths[position, class]: the number of bands that contain all rows of a class up to a position

A reader that needs the best of each class reads the front of the file only. The merge reads band 0 of all shard groups.
It takes the K-th best score of each class as the threshold. It reads the next band of a shard group only if an unread
row can still reach a threshold. This is a threshold algorithm: TPUT (Cao & Wang 2004), in the form of
Hübschle-Schneider & Sanders (arXiv:1502.03942), with bands as prefixes.

A hash of the sample's identity breaks ties. The identity is the name of the shard and the index in it, so the order
depends neither on the pod that scored it nor on the time. `band` is also a column, so any Parquet tool can prune row
groups by its statistics.

Cost:
    A billion images with 10 classes each are 10^10 rows of about 6 bytes, 60 GB in 125 files. For K = 16,000 the merge
    reads 138 MB of them, 1.56 times the size of the winners. The measurements are in docs/benchmarks.md.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from semiscale.common.errors import InvalidInputError
from semiscale.storage.parquet import encode_parquet
from semiscale.storage.parquet_row_groups import RowGroupReader

U64 = NDArray[np.uint64]
NO_SAMPLES: U64 = np.empty(0, np.uint64)
FORMAT = 2
# The numbers of values of the columns `class` and `position`.
MAX_CLASSES, MAX_CLASSES_KEPT = 1 << 16, 1 << 8
# Images that a pod ranks at the same time. A shard group is planned for two thirds of this. The plan estimates its size
# from the first samples of a few shards, which is inaccurate if image sizes vary much.
MAX_IMAGES_PER_RANKING = 12_000_000
_FOOTER = "semiscale.scores"
_SCHEMA = pa.schema(
    [
        ("band", pa.uint8()),
        ("class", pa.uint16()),
        ("score", pa.float32()),
        ("sample", pa.uint64()),
        ("position", pa.uint8()),
    ]
)


@dataclass(frozen=True)
class ScoreRows:
    """Scored rows as columns of equal length.

    Attributes:
        label: The class.
        score: The log-odds of the class.
        sample: The code `shard << 32 | index`. The shard is its number in the shard group.
        position: The rank of the class among the classes of its image, from 0.
        tie: Orders rows of equal score.
    """

    label: NDArray[np.uint16]
    score: NDArray[np.float32]
    sample: U64
    position: NDArray[np.uint8]
    tie: U64

    def __len__(self) -> int:
        return len(self.score)

    def take(self, chosen: NDArray[Any]) -> "ScoreRows":
        """Return the rows at these indexes, or those that this mask selects."""
        return ScoreRows(
            self.label[chosen], self.score[chosen], self.sample[chosen], self.position[chosen], self.tie[chosen]
        )


def encode_sample_ids(shard: int, indexes: NDArray[np.int64]) -> U64:
    """Return the codes of samples of one shard.

    Args:
        shard: The number of the shard in its shard group.
        indexes: The indexes of the samples in the shard.
    """
    return np.uint64(shard) << np.uint64(32) | indexes.astype(np.uint64)


def tie_breakers(codes: U64, shard_names: Sequence[str]) -> U64:
    """Return a 64-bit hash of the identity of each sample.

    The identity is (shard name, index), so the hash survives a move of the bucket.

    Args:
        codes: The codes of samples of a shard group.
        shard_names: The names of the shards of the shard group, by number.
    """
    seeds = np.array([_hash_name(name) for name in shard_names], np.uint64)
    # Consecutive indexes are spread by the golden ratio, as in splitmix64.
    spread = seeds[(codes >> np.uint64(32)).astype(np.int64)] + (codes & np.uint64(0xFFFFFFFF)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return splitmix64(spread)


def splitmix64(values: U64) -> U64:
    """Mix values, one to one, as splitmix64 ends (Steele, Lea & Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)), np.uint64)


def _hash_name(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def argsort_best_per_class(rows: ScoreRows, at_most: int | None = None) -> NDArray[np.int64]:
    """Return the indexes of the best rows of each class.

    They are in order of class, descending score and tie-breaker.

    Args:
        rows: Rows in any order.
        at_most: The number of rows of each class, or None for all.

    Cost:
        Each class is sorted for itself, which stays in the cache of the processor. It takes a tenth of the time of one
        sort by all three keys.
    """
    by_class = np.argsort(rows.label, kind="stable")
    parts = [by_class[start:end] for start, end in pairwise(class_offsets(rows.label))]
    best = [indexes[_argsort_best(rows.score[indexes], rows.tie[indexes], at_most)] for indexes in parts]
    return np.concatenate([np.empty(0, np.int64), *best])


def _argsort_best(score: NDArray[np.float32], tie: U64, at_most: int | None) -> NDArray[np.int64]:
    """Return the indexes of the best rows of one class, in order."""
    if at_most is None or at_most >= len(score):
        return _argsort_descending(score, tie)
    # Only rows that reach the last score in question are sorted.
    last = len(score) - at_most
    chosen = np.flatnonzero(score >= np.partition(score, last)[last])
    return chosen[_argsort_descending(score[chosen], tie[chosen])[:at_most]]


def _argsort_descending(score: NDArray[np.float32], tie: U64) -> NDArray[np.int64]:
    """Return the order by descending score, then by tie-breaker."""
    order = np.argsort(-score)
    descending = score[order]
    # Equal scores are rare, so tie-breakers are compared only among them.
    equals_next = np.zeros(len(order), bool)
    equals_next[:-1] = descending[:-1] == descending[1:]
    tied = np.flatnonzero(equals_next | np.roll(equals_next, 1))
    tied_rows = order[tied]
    order[tied] = tied_rows[np.lexsort((tie[tied_rows], -score[tied_rows]))]
    return order


def class_offsets(labels: NDArray[np.uint16], classes: int = 0) -> list[int]:
    """Return the first row of each class, and the end of the last class.

    Args:
        labels: The classes of rows that are sorted by class.
        classes: The number of classes, if the last ones may have no rows.
    """
    return [0, *np.cumsum(np.bincount(labels, minlength=classes)).tolist()]


def rank_within_class(labels: NDArray[np.uint16], classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rank of each row in its class.

    Args:
        labels: The classes of rows that are sorted by class.
        classes: The number of classes.

    Returns:
        The ranks, from 0, and the number of rows of each class.
    """
    offsets = np.array(class_offsets(labels, classes))
    counts = np.diff(offsets)
    return np.arange(len(labels)) - np.repeat(offsets[:-1], counts), counts


def first_band_size(images_per_class: int, units: float) -> int:
    """Return the number of ranks of a class in band 0.

    A hash distributes the top K of a class over S shard groups. Each gets K/S, and rarely more than 4 standard
    deviations above it. One more row shows that the next row cannot win. Band 0 is then enough for all but one in ten
    thousand classes of a shard group.

    Args:
        images_per_class: K.
        units: S, the number of shard groups. It need not be whole, because a part of a shard group has a smaller share.

    Returns:
        The size `head` of band 0, at most K + 1.
    """
    expected = images_per_class / units
    # The standard deviation of the binomial distribution. It is 0 for a single shard group.
    deviation = math.sqrt(expected * (1 - 1 / units))
    return min(math.ceil(expected + 4 * deviation), images_per_class) + 1


def band_of_rank(rank: NDArray[np.int64], head: int) -> NDArray[np.uint8]:
    """Return the band of each rank.

    Band 0 has the ranks below `head`, band 1 the next `head` / 4, and each further band twice as many. Band 1 is narrow
    because one class in thousands needs it. Doubling makes the number of row groups logarithmic in the rows.

    Args:
        rank: The ranks, from 0.
        head: The number of ranks in band 0.
    """
    steps = np.maximum((rank - head) // max(head // 4, 1) + 1, 0)
    # The binary exponent of an integer is its length in bits.
    return np.frexp(steps)[1].astype(np.uint8)


@dataclass(frozen=True)
class BandedRows:
    """The rows of a shard group in the order of its score file, and the band of each."""

    rows: ScoreRows
    band: NDArray[np.uint8]


def sort_into_bands(rows: ScoreRows, head: int) -> BandedRows:
    """Sort the rows of a shard group into the order of its score file.

    Args:
        rows: Rows in any order.
        head: The number of ranks in band 0.

    Cost:
        One sort, about two seconds for ten million rows. Memory for the rows twice, and 8 bytes a row.
    """
    order = argsort_best_per_class(rows)
    labels = rows.label[order]
    band = band_of_rank(rank_within_class(labels, int(labels.max(initial=0)) + 1)[0], head)
    by_band = np.argsort(band, kind="stable")
    band, order = band[by_band], order[by_band]
    # Each of them is as large as a column, and the next line copies all columns.
    del labels, by_band
    return BandedRows(rows.take(order), band)


def write_score_file(banded: BandedRows, classes: int, metadata: dict[str, Any]) -> bytes:
    """Return the score file of a shard group.

    Args:
        banded: The rows of the shard group with their bands.
        classes: The number of classes.
        metadata: Further entries of the footer. They replace entries of the same name.

    Cost:
        Memory for the rows and the file, about 6 bytes a row.
    """
    rows = banded.rows
    columns = [banded.band, rows.label, rows.score, rows.sample, rows.position]
    table = pa.table([pa.array(column) for column in columns], schema=_SCHEMA)
    footer = {"format": FORMAT, "depths": _count_depths(banded.band, rows, classes).tolist(), **metadata}
    return _encode(table, np.flatnonzero(np.diff(banded.band)) + 1, footer)


def _count_depths(band: NDArray[np.uint8], rows: ScoreRows, classes: int) -> NDArray[np.uint8]:
    """Return depths[position, class], the number of bands that contain all rows.

    These are the rows of the class at this position and at all positions before it.
    """
    depths = np.zeros((int(rows.position.max(initial=0)) + 1, classes), np.uint8)
    # Rows are in order of their bands, and NumPy keeps the last assignment.
    depths[rows.position, rows.label] = band + 1
    return np.maximum.accumulate(depths, axis=0)


def _encode(table: pa.Table, band_starts: NDArray[np.int64], footer: dict[str, Any]) -> bytes:
    """Return a Parquet file with one row group per band, of about 6 bytes a row.

    BYTE_STREAM_SPLIT separates the bytes of scores and samples, because the high ones repeat. It is a standard encoding
    of Parquet.
    """
    groups = (table.slice(start, end - start) for start, end in pairwise([0, *band_starts.tolist(), len(table)]))
    return encode_parquet(
        groups,
        _SCHEMA,
        lambda: {_FOOTER: _compress_footer(footer)},
        compression="zstd",
        use_dictionary=["band", "position"],
        column_encoding={"class": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT", "sample": "BYTE_STREAM_SPLIT"},
        write_statistics=["band", "class"],
        # Arrow's copy of the schema is larger than the schema of Parquet.
        store_schema=False,
    )


def _compress_footer(footer: dict[str, Any]) -> bytes:
    """Compress a footer, because the merge reads those of all shard groups.

    The names of a thousand shards take 5 kB instead of 40 kB.
    """
    return base64.b85encode(zlib.compress(json.dumps(footer, separators=(",", ":")).encode(), 9))


class ScoreFileReader:
    """The score file of a shard group, read band by band with one ranged request each.

    It is not thread-safe.

    Attributes:
        uri: The score file.
        teacher: The digest of the teacher.
        unit: The digest of the shard group.
        shard_names: The names of the shards, by number.
        last_scores: The lowest score of each class that was read, or infinity before its first row.
    """

    def __init__(self, uri: str, removed: U64 = NO_SAMPLES) -> None:
        """Read the footer.

        Args:
            uri: The score file.
            removed: The codes of samples that are skipped.

        Raises:
            InvalidInputError: The file is not a score file of this version.
            SemiscaleError: The file is missing or damaged.
        """
        self.uri = uri
        self._removed = removed
        self._groups = RowGroupReader(uri)
        compressed = (self._groups.metadata.metadata or {}).get(_FOOTER.encode())
        footer = json.loads(zlib.decompress(base64.b85decode(compressed))) if compressed else {}
        if footer.get("format") != FORMAT:
            raise InvalidInputError(
                "SEMI-E160", f"{uri}: This is not a score file of this version. Delete its folder and score again."
            )
        self.teacher: str = footer["teacher"]
        self.unit: str = footer["unit"]
        self.shard_names: list[str] = footer["shards"]
        self._depths = np.array(footer["depths"], np.uint8)
        self._bands_read = 0
        self.last_scores = np.full(self._depths.shape[1], np.inf, np.float32)

    @property
    def bytes_read(self) -> int:
        """Return the number of bytes requested from the store."""
        return self._groups.bytes_read

    @property
    def rows(self) -> int:
        """Return the number of rows of the file."""
        return int(self._groups.metadata.num_rows)

    @property
    def classes_kept(self) -> int:
        """Return how many classes of each image were kept, which is the largest possible P."""
        return len(self._depths)

    def has_unread_rows(self, classes_per_image: int) -> NDArray[np.bool_]:
        """Return for each class whether it has unread rows.

        Only the P = `classes_per_image` best classes of an image count.
        """
        position = min(classes_per_image, len(self._depths)) - 1
        return np.asarray(self._depths[position] > self._bands_read)

    def read_next_band(self) -> ScoreRows:
        """Read the next band and update `last_scores`.

        The unread rows of a class have at most its last score.

        Raises:
            SemiscaleError: The file is missing or damaged.

        Cost:
            One ranged request, and memory for the rows of the band.
        """
        table = self._groups.read(self._bands_read, _SCHEMA.names[1:])
        self._bands_read += 1
        label, score, sample, position = (column.to_numpy() for column in table.columns)
        # Rows are in descending order, so the last assignment to a class is its lowest score.
        self.last_scores[label] = score
        rows = ScoreRows(label, score, sample, position, tie_breakers(sample, self.shard_names))
        return rows.take(np.isin(sample, self._removed, invert=True)) if len(self._removed) else rows
