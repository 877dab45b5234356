"""Where the winners lie: from (unit, sample) to shard, key and byte range, by the units' lists of samples."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.merge.select import Candidates
from components.shared import storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.receipts import UnitReceipt
from components.shared.scores import U64, Rows, UnitScores, ranks


def located(winners: Candidates, receipts: list[UnitReceipt], units: list[UnitScores], classes: int) -> pa.Table:
    """Return D̂ as a table, one row an (image, class), in order of class and rank, each with the place of its bytes.

    Reads the sample lists of the units that have winners, one at a time: about ten bytes an image of the pool, which
    is the price of a manifest with keys. Memory: the table, about 100 bytes a winner.
    """
    rank, _ = ranks(winners.rows.label, classes)
    by_unit = np.argsort(winners.unit, kind="stable")
    ends = np.cumsum(np.bincount(winners.unit, minlength=len(units)))
    parts = []
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start < end:
            mine = by_unit[start:end]
            parts.append(_located_in(receipts[number], units[number], winners.rows.take(mine), rank[mine]))
    if not parts:
        raise SemiscaleError("the pool has no image to select: none could be read, or all were removed")
    # Back from the units' order to that of the winners.
    return pa.concat_tables(parts).take(pa.array(np.argsort(by_unit, kind="stable")))


def _located_in(receipt: UnitReceipt, unit: UnitScores, rows: Rows, rank: NDArray[np.int64]) -> pa.Table:
    samples = pq.read_table(io.BytesIO(storage.read(receipt.samples)))
    found = samples.take(pa.array(np.searchsorted(samples["sample"].to_numpy(), rows.sample)))
    names = np.array(unit.shard_names, object)
    return pa.table(
        {
            "class": rows.label,
            "rank": rank.astype(np.int32),
            "score": rows.score,
            "position": rows.position,
            "shard": names[(rows.sample >> np.uint64(32)).astype(np.int64)],
            "index": (rows.sample & np.uint64(0xFFFFFFFF)).astype(np.int64),
            "key": found["key"],
            "uri": found["uri"].cast(pa.string()),
            "offset": found["offset"],
            "size_bytes": found["size_bytes"],
        }
    )


def read_keys(uri: str) -> list[str]:
    """Read a removal list: one key a line. Raises Refused where there is none."""
    data = storage.read_if_there(uri)
    if data is None:
        raise Refused(f"remove: {uri}: no such file; expected one key a line")
    return sorted({line.strip() for line in data.decode().splitlines() if line.strip()})


def codes_of(keys: list[str], receipt: UnitReceipt) -> U64:
    """Return the codes of a unit's samples that have one of these keys, in order.

    A key that several images share removes them all: for an opt-out, the safe side. Reads the unit's keys.
    """
    samples = pq.read_table(io.BytesIO(storage.read(receipt.samples)), columns=["sample", "key"])
    chosen = pc.is_in(samples["key"], value_set=pa.array(keys, pa.string()))
    return np.asarray(samples["sample"].filter(chosen).to_numpy(), np.uint64)
