"""Where the winners lie: from (unit, sample) to shard, key and byte range, by the units' places."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.merge.select import READERS, Candidates
from components.shared import places
from components.shared.errors import SemiscaleError
from components.shared.receipts import Removal, UnitReceipt
from components.shared.scores import NOTHING, U64, Rows, UnitScores, ranks

KEYS_SHOWN = 5  # of those that match nothing


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
        raise SemiscaleError("the pool has no image to select: all were unreadable, removed or below min_probability")
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
    found, bytes_read = places.find(receipt, rows.sample)
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


class Removed(NamedTuple):
    """The samples of one unit that a removal list takes out, in order, and which of the list's keys they have."""

    codes: U64
    keys: NDArray[np.int32]
    bytes_read: int


def removed(keys: list[str], receipt: UnitReceipt) -> Removed:
    """Return the samples of a unit that have one of these keys.

    A key that several images share removes them all: for an opt-out, the safe side. Reads the keys of all the unit's
    samples, about five bytes an image, a little at a time: so a key that matches nothing is known to, and at no cost.
    """
    if not keys:
        return Removed(NOTHING, np.empty(0, np.int32), 0)
    wanted = pa.array(keys, pa.string())
    batches, bytes_read = places.read_samples(receipt, ["sample", "key"])
    codes, numbers = [NOTHING], [np.empty(0, np.int32)]
    for batch in batches:
        number = pc.index_in(batch["key"], value_set=wanted)
        codes.append(batch["sample"].filter(number.is_valid()).to_numpy())
        numbers.append(number.drop_null().to_numpy())
    return Removed(np.concatenate(codes), np.unique(np.concatenate(numbers)), bytes_read)


def removal_of(keys: list[str], parts: list[Removed]) -> Removal | None:
    """Say how many keys of a removal list match no scored image in any unit; None where there is no list."""
    if not keys:
        return None
    matched = np.zeros(len(keys), bool)
    for part in parts:
        matched[part.keys] = True
    unmatched = np.flatnonzero(~matched)
    return Removal(
        keys=len(keys), unmatched=len(unmatched), examples=[keys[number] for number in unmatched[:KEYS_SHOWN]]
    )
