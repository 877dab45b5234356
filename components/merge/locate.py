"""Where the winners lie: from (unit, sample) to shard, key and byte range, by the units' places."""

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.merge.select import READERS, Candidates
from components.shared import places, storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.receipts import UnitReceipt
from components.shared.scores import NOTHING, U64, Rows, UnitScores, ranks

KEYS_AT_ONCE = 1 << 18  # of a unit, compared with a removal list


class Located(NamedTuple):
    """D̂ with the places of its images, and how many bytes were read to find them."""

    table: pa.Table
    bytes_read: int


def located(winners: Candidates, receipts: list[UnitReceipt], units: list[UnitScores], classes: int) -> Located:
    """Return D̂ as a table, one row an (image, class), in order of class and rank, each with the place of its bytes.

    Reads the places of as many bands as the selection needed, of the units that have winners: about three times the
    winners' own. Memory: the table, about 100 bytes a winner, twice.
    """
    if not len(winners):
        raise SemiscaleError("the pool has no image to select: none could be read, or all were removed")
    rank, _ = ranks(winners.rows.label, classes)
    by_unit = np.argsort(winners.unit, kind="stable")
    edges = np.searchsorted(winners.unit[by_unit], np.arange(len(units) + 1))
    mine = {number: by_unit[start:end] for number, (start, end) in enumerate(pairwise(edges)) if start < end}

    def one(number: int) -> tuple[pa.Table, int]:
        rows = winners.rows.take(mine[number])
        return _located_in(receipts[number], units[number], rows, rank[mine[number]])

    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(one, mine))
    # Back from the units' order to that of the winners.
    table = pa.concat_tables([part for part, _ in parts]).take(pa.array(np.argsort(by_unit, kind="stable")))
    return Located(table, sum(size for _, size in parts))


def _located_in(receipt: UnitReceipt, unit: UnitScores, rows: Rows, rank: NDArray[np.int64]) -> tuple[pa.Table, int]:
    found, bytes_read = places.find(receipt.places, receipt.samples, rows.sample)
    names = pa.array(unit.shard_names)
    columns = {
        "class": rows.label,
        "rank": rank.astype(np.int32),
        "score": rows.score,
        "position": rows.position,
        "shard": names.take(pa.array(rows.sample >> np.uint64(32))),
        "index": (rows.sample & np.uint64(0xFFFFFFFF)).astype(np.int64),
    }
    return pa.table({**columns, **{name: found[name] for name in places.SCHEMA.names[1:]}}), bytes_read


def read_keys(uri: str) -> list[str]:
    """Read a removal list: one key a line. Raises Refused where there is none."""
    data = storage.read_if_there(uri)
    if data is None:
        raise Refused(f"remove: {uri}: no such file; expected one key a line")
    return sorted({line.strip() for line in data.decode().splitlines() if line.strip()})


def codes_of(keys: list[str], receipt: UnitReceipt) -> tuple[U64, int]:
    """Return the codes of a unit's samples that have one of these keys, in order, and how many bytes were read.

    A key that several images share removes them all: for an opt-out, the safe side. Reads the unit's samples, about
    five bytes an image, a little at a time.
    """
    if not keys:
        return NOTHING, 0
    wanted = pa.array(keys, pa.string())
    data = storage.read(receipt.samples)
    batches = pq.ParquetFile(io.BytesIO(data)).iter_batches(KEYS_AT_ONCE, columns=["sample", "key"])
    found = [batch["sample"].filter(pc.is_in(batch["key"], value_set=wanted)).to_numpy() for batch in batches]
    return np.concatenate([NOTHING, *found]), len(data)
