"""Scores at rest: the rank-banded Parquet file of one unit, written by the scan and read by the merge.

A row is (band, class, score, sample, position): the log-odds of one of an image's best classes. Rows are sorted by
(band, class, score descending, tie). Band 0 holds the first `head` ranks of every class in this unit, band 1 the next
`head` / 4, and every further band twice as many; each band is one row group, so that a reader that needs the best of
each class reads the front of the file and no more. The footer says, per class and position, how deep its rows reach.

Ties are broken by a hash of the sample's identity (the shard's name and the sample's index in it), so that the order
depends neither on who scored it nor on when. `band` is also a column: any Parquet tool can prune by its statistics.
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
MAX_CLASSES, MAX_CLASSES_KEPT = 1 << 16, 1 << 8  # what the columns `class` and `position` can number
# Images that a pod ranks at once. A unit is planned to have two thirds of that, as far as the beginnings of a few of
# the pool's shards tell; where images are of many sizes, they tell little.
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

    `sample` is shard << 32 | index, the shard counted within the unit; `position` is the class's place, from 0, in its
    image's order; `tie` orders rows of equal score.
    """

    label: NDArray[np.uint16]
    score: NDArray[np.float32]
    sample: U64
    position: NDArray[np.uint8]
    tie: U64

    def __len__(self) -> int:
        return len(self.score)

    def take(self, chosen: NDArray[Any]) -> "ScoreRows":
        """Return the rows at these places, or where this mask is true."""
        return ScoreRows(
            self.label[chosen], self.score[chosen], self.sample[chosen], self.position[chosen], self.tie[chosen]
        )


def encode_sample_ids(shard: int, indexes: NDArray[np.int64]) -> U64:
    """Return the codes of samples of one shard of a unit."""
    return np.uint64(shard) << np.uint64(32) | indexes.astype(np.uint64)


def tie_breakers(codes: U64, shard_names: Sequence[str]) -> U64:
    """Hash every sample's identity, (shard name, index): 64 well-mixed bits, the same wherever the shard lies."""
    seeds = np.array([_name_hash(name) for name in shard_names], np.uint64)
    spread = seeds[(codes >> np.uint64(32)).astype(np.int64)] + (codes & np.uint64(0xFFFFFFFF)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return splitmix64(spread)


def splitmix64(values: U64) -> U64:
    """Mix 64 bits well: the finaliser of splitmix64 (Steele, Lea & Flood 2014), one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)), np.uint64)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def argsort_best_per_class(rows: ScoreRows, at_most: int | None = None) -> NDArray[np.int64]:
    """Return the places of each class's best rows, in order of class, then score descending, then tie.

    Class by class, which stays in the processor's cache: a tenth of the time of one sort by all three.
    """
    by_class = np.argsort(rows.label, kind="stable")
    parts = [by_class[start:end] for start, end in pairwise(class_offsets(rows.label))]
    best = [places[_best_first(rows.score[places], rows.tie[places], at_most)] for places in parts]
    return np.concatenate([np.empty(0, np.int64), *best])


def _best_first(score: NDArray[np.float32], tie: U64, at_most: int | None) -> NDArray[np.int64]:
    """Return the best places of one class in order. Only those that can be among them are sorted."""
    if at_most is None or at_most >= len(score):
        return _descending(score, tie)
    last = len(score) - at_most
    chosen = np.flatnonzero(score >= np.partition(score, last)[last])
    return chosen[_descending(score[chosen], tie[chosen])[:at_most]]


def _descending(score: NDArray[np.float32], tie: U64) -> NDArray[np.int64]:
    """Sort by score, then tie. Equal scores are rare, so the ties are compared only where there are some."""
    order = np.argsort(-score)
    descending = score[order]
    as_next = np.zeros(len(order), bool)
    as_next[:-1] = descending[:-1] == descending[1:]
    tied = np.flatnonzero(as_next | np.roll(as_next, 1))
    among = order[tied]
    order[tied] = among[np.lexsort((tie[among], -score[among]))]
    return order


def class_offsets(labels: NDArray[np.uint16], classes: int = 0) -> list[int]:
    """Return where each class's rows begin in rows sorted by class, and where the last one's end."""
    return [0, *np.cumsum(np.bincount(labels, minlength=classes)).tolist()]


def rank_within_class(labels: NDArray[np.uint16], classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each row's rank in its class, from 0, and the rows per class; the rows are sorted by class."""
    edges = np.array(class_offsets(labels, classes))
    counts = np.diff(edges)
    return np.arange(len(labels)) - np.repeat(edges[:-1], counts), counts


def first_band_size(images_per_class: int, units: float) -> int:
    """Return how many ranks of a class band 0 holds.

    A class's top K fall on S units chosen by hash: K/S in each, give or take 4 standard deviations, at most all, and
    one more row to see that the next cannot win. That makes band 0 enough for all but one class of a unit in ten
    thousand.
    """
    expected = images_per_class / units
    deviation = math.sqrt(expected * (1 - 1 / units))  # binomial: one unit has all for certain
    return min(math.ceil(expected + 4 * deviation), images_per_class) + 1


def band_of_rank(rank: NDArray[np.int64], head: int) -> NDArray[np.uint8]:
    """Return the band of each rank: 0 below `head`, then 1 for the next `head` / 4, and each one twice as wide.

    The narrow second band is for the one class in thousands that band 0 is not enough for; the doubling bounds the
    row groups by the logarithm of the rows.
    """
    steps = np.maximum((rank - head) // max(head // 4, 1) + 1, 0)
    return np.frexp(steps)[1].astype(np.uint8)  # the length of an integer in bits


@dataclass(frozen=True)
class BandedRows:
    """One unit's rows in the order of its score file, and the band of each."""

    rows: ScoreRows
    band: NDArray[np.uint8]


def sort_into_bands(rows: ScoreRows, head: int) -> BandedRows:
    """Put one unit's rows in the order of its score file.

    Time: a sort, about two seconds for ten million rows; memory: the rows twice, and 8 bytes a row.
    """
    order = argsort_best_per_class(rows)
    labels = rows.label[order]
    band = band_of_rank(rank_within_class(labels, int(labels.max(initial=0)) + 1)[0], head)
    by_band = np.argsort(band, kind="stable")
    band, order = band[by_band], order[by_band]
    del labels, by_band  # each as large as a column
    return BandedRows(rows.take(order), band)


def write_score_file(unit: BandedRows, classes: int, metadata: dict[str, Any]) -> bytes:
    """Lay out one unit as a banded Parquet file; `metadata` goes into its footer, and prevails there."""
    rows = unit.rows
    columns = [unit.band, rows.label, rows.score, rows.sample, rows.position]
    table = pa.table([pa.array(column) for column in columns], schema=_SCHEMA)
    footer = {"format": FORMAT, "depths": _depths(unit.band, rows, classes).tolist(), **metadata}
    return _written(table, np.flatnonzero(np.diff(unit.band)) + 1, footer)


def _depths(band: NDArray[np.uint8], rows: ScoreRows, classes: int) -> NDArray[np.uint8]:
    """Return [position, class]: how many bands hold all of a class's rows at this position and those before it."""
    depths = np.zeros((int(rows.position.max(initial=0)) + 1, classes), np.uint8)
    depths[rows.position, rows.label] = band + 1  # in order of the bands, and the last assignment stays
    return np.maximum.accumulate(depths, axis=0)


def _written(table: pa.Table, cuts: NDArray[np.int64], footer: dict[str, Any]) -> bytes:
    """Write a table cut into row groups. Scores and samples are split into their bytes, of which the high ones repeat:
    6 bytes a row, and every Parquet reader understands it.
    """
    groups = (table.slice(start, end - start) for start, end in pairwise([0, *cuts.tolist(), len(table)]))
    return encode_parquet(
        groups,
        _SCHEMA,
        lambda: {_FOOTER: _packed(footer)},
        compression="zstd",
        use_dictionary=["band", "position"],
        column_encoding={"class": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT", "sample": "BYTE_STREAM_SPLIT"},
        write_statistics=["band", "class"],
        store_schema=False,  # Arrow's copy of the schema is larger than Parquet's own
    )


def _packed(footer: dict[str, Any]) -> bytes:
    """A footer is read of every unit, so it counts: the names of a thousand shards are 40 kB as they are, and 5 so."""
    return base64.b85encode(zlib.compress(json.dumps(footer, separators=(",", ":")).encode(), 9))


class ScoreFileReader:
    """One unit's score file, read band by band, each in one ranged request. Not to be shared by threads.

    `removed` are codes of samples that are passed over.
    """

    def __init__(self, uri: str, removed: U64 = NO_SAMPLES) -> None:
        self.uri = uri
        self._removed = removed
        self._groups = RowGroupReader(uri)
        packed = (self._groups.metadata.metadata or {}).get(_FOOTER.encode())
        footer = json.loads(zlib.decompress(base64.b85decode(packed))) if packed else {}
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
        """What was asked of the store."""
        return self._groups.bytes_read

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return int(self._groups.metadata.num_rows)

    @property
    def classes_kept(self) -> int:
        """How many classes of each image were kept when it was scored: the largest P that can be selected."""
        return len(self._depths)

    def has_unread_rows(self, classes_per_image: int) -> NDArray[np.bool_]:
        """Say of each class whether some of its rows have not been read, counting each image's P best classes alone."""
        place = min(classes_per_image, len(self._depths)) - 1
        return np.asarray(self._depths[place] > self._bands_read)

    def read_next_band(self) -> ScoreRows:
        """Read the next band, and note each class's last score in it: what follows is not better."""
        table = self._groups.read(self._bands_read, _SCHEMA.names[1:])
        self._bands_read += 1
        label, score, sample, position = (column.to_numpy() for column in table.columns)
        # Rows are in order, so the last assignment to a class is its lowest score.
        self.last_scores[label] = score
        rows = ScoreRows(label, score, sample, position, tie_breakers(sample, self.shard_names))
        return rows.take(np.isin(sample, self._removed, invert=True)) if len(self._removed) else rows
