"""Scores at rest: the rank-banded Parquet file of one unit, written by the scan and read by the merge.

A row is (band, class, score, sample, position): the log-odds of one of an image's best classes. Rows are sorted by
(band, class, score descending, tie). Band 0 holds the first `head` ranks of every class in this unit, band 1 the next
`head`, band 2 the next 2 x `head`, and so on; each band is one row group, so that a reader that needs the best of each
class reads the front of the file and no more. The footer carries the rows per class, from which every band's contents
follow.

Ties are broken by a hash of the sample's identity (the shard's name and the sample's index in it), so that the order
depends neither on who scored it nor on when. `band` is also a column: any Parquet tool can prune by its statistics.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.shared import storage
from components.shared.errors import Refused

U64 = NDArray[np.uint64]
FORMAT = 1
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
class Rows:
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

    def take(self, chosen: NDArray[Any]) -> "Rows":
        """Return the rows at these places, or where this mask is true."""
        return Rows(
            self.label[chosen], self.score[chosen], self.sample[chosen], self.position[chosen], self.tie[chosen]
        )


def sample_codes(shard: int, indexes: NDArray[np.int64]) -> U64:
    """Return the codes of samples of one shard of a unit."""
    return np.uint64(shard) << np.uint64(32) | indexes.astype(np.uint64)


def ties(codes: U64, shard_names: Sequence[str]) -> U64:
    """Hash every sample's identity, (shard name, index): 64 well-mixed bits, the same wherever the shard lies."""
    seeds = np.array([_name_hash(name) for name in shard_names], np.uint64)
    mixed = seeds[(codes >> np.uint64(32)).astype(np.int64)] + (codes & np.uint64(0xFFFFFFFF)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    # The finaliser of splitmix64 (Steele, Lea & Flood 2014).
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def ranked(rows: Rows) -> Rows:
    """Sort rows by class, then score descending, then tie."""
    by_tie = np.argsort(rows.tie, kind="stable")
    key = rows.label[by_tie].astype(np.uint64) << np.uint64(32) | _descending(rows.score[by_tie]).astype(np.uint64)
    return rows.take(by_tie[np.argsort(key, kind="stable")])


def ranks(labels: NDArray[np.uint16], classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each row's rank in its class, from 0, and the rows per class; the rows are sorted by class."""
    counts = np.bincount(labels, minlength=classes).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.arange(len(labels)) - np.repeat(starts, counts), counts


def _descending(score: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Map floats to integers in reverse order: IEEE 754 bits sort as signed magnitudes."""
    bits = np.ascontiguousarray(score + np.float32(0)).view(np.uint32)  # -0 and +0 are one score
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return ~ascending


def head_size(images_per_class: int, units: int) -> int:
    """Return how many ranks of a class band 0 holds.

    A class's top K fall evenly on S units chosen by hash: K/S in each, give or take 4 standard deviations. The next
    power of two makes band 0 enough for nearly every class.
    """
    expected = images_per_class / units
    return 1 << max(math.ceil(math.log2(expected + 4 * math.sqrt(expected))), 0)


def encode(rows: Rows, classes: int, head: int, metadata: dict[str, Any]) -> bytes:
    """Lay out one unit's rows as a banded Parquet file.

    Time: two sorts, about a second for ten million rows; memory: the rows twice.
    """
    by_rank = ranked(rows)
    rank, counts = ranks(by_rank.label, classes)
    bands = np.zeros(len(rank), np.uint8)
    beyond = rank >= head
    bands[beyond] = np.log2(rank[beyond] // head).astype(np.uint8) + 1
    order = np.argsort(bands, kind="stable")
    banded, bands = by_rank.take(order), bands[order]
    columns = [bands, banded.label, banded.score, banded.sample, banded.position]
    table = pa.table([pa.array(column) for column in columns], schema=_SCHEMA)
    footer = {**metadata, "format": FORMAT, "head": head, "rows_per_class": counts.tolist()}
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        _SCHEMA.with_metadata({"semiscale": json.dumps(footer)}),
        compression="zstd",
        use_dictionary=["band", "class", "position"],
        column_encoding={"score": "BYTE_STREAM_SPLIT", "sample": "PLAIN"},
    )
    with writer:
        ends = np.searchsorted(bands, np.arange(int(bands.max(initial=0)) + 1), side="right")
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            writer.write_table(table.slice(start, end - start), row_group_size=max(end - start, 1))
    return buffer.getvalue()


class UnitScores:
    """One unit's score file, read band by band. `bytes_read` counts what was asked of the store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._file = _ExactReads(uri)
        self._parquet = pq.ParquetFile(self._file)
        footer = json.loads((self._parquet.schema_arrow.metadata or {}).get(b"semiscale", b"{}"))
        if footer.get("format") != FORMAT:
            raise Refused(f"{uri}: not a score file of this version")
        self.teacher: str = footer["teacher"]
        self.unit: str = footer["unit"]
        self.shard_names: list[str] = footer["shards"]
        self._head: int = footer["head"]
        self._rows_per_class = np.array(footer["rows_per_class"], np.int64)
        self._bands_read = 0
        self.last_scores = np.full(len(self._rows_per_class), np.inf, np.float32)

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the store so far."""
        return self._file.bytes_read

    def remaining(self) -> NDArray[np.int64]:
        """Return how many rows of each class have not been read."""
        return np.maximum(self._rows_per_class - self._ranks_read(), 0)

    def read_band(self) -> Rows:
        """Read the next band, and note each class's last score in it: what follows is not better."""
        table = self._parquet.read_row_group(self._bands_read, columns=["class", "score", "sample", "position"])
        self._bands_read += 1
        label, score, sample, position = (column.to_numpy() for column in table.columns)
        # Rows are in order, so the last assignment to a class is its lowest score.
        self.last_scores[label] = score
        return Rows(label, score, sample, position, ties(sample, self.shard_names))

    def _ranks_read(self) -> int:
        return self._head * 2 ** (self._bands_read - 1) if self._bands_read else 0


class _ExactReads(io.RawIOBase):
    """A file of the store that reads the bytes asked for and no more, and counts them."""

    def __init__(self, uri: str) -> None:
        entry = storage.stat(uri)
        if entry is None:
            raise FileNotFoundError(uri)
        self._entry, self._position, self.bytes_read = entry, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size_bytes}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        size = self._entry.size_bytes - self._position if size < 0 else size
        data = storage.read(self._entry.uri, self._position, size)
        self._position += len(data)
        self.bytes_read += len(data)
        return data
