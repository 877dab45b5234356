"""Where the winners lie: from (unit, sample) to shard, key and byte range, by the units' places."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from semiscale.common.errors import SemiscaleError
from semiscale.receipts.merge import ExclusionStats
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.scores import sample_locations
from semiscale.scores.score_file import NO_SAMPLES, U64, ScoreFileReader, ScoreRows, rank_within_class
from semiscale.stages.merge.top_k import MAX_CONCURRENT_READS, Candidates

MAX_EXAMPLE_KEYS = 5  # of those that match nothing


class LocatedSelection(NamedTuple):
    """D̂ with the places of its images, and how many bytes were read to find them."""

    table: pa.Table
    bytes_read: int


def locate_winners(
    winners: Candidates, receipts: list[ShardGroupReceipt], units: list[ScoreFileReader], classes: int
) -> LocatedSelection:
    """Return D̂ as a table, one row an (image, class), in order of class and rank, each with the place of its bytes.

    Reads the places of as many bands as the selection needed, of the units that have winners: about three times the
    winners' own. Memory: the table, about 100 bytes a winner, twice.
    """
    if not len(winners):
        raise SemiscaleError(
            "SEMI-E300",
            "unlabeled: Every image is unreadable, removed or below min_probability. Add images or lower it.",
        )
    rank, _ = rank_within_class(winners.rows.label, classes)
    by_unit = np.argsort(winners.unit, kind="stable")
    edges = np.searchsorted(winners.unit[by_unit], np.arange(len(units) + 1))
    mine = {number: by_unit[start:end] for number, (start, end) in enumerate(pairwise(edges)) if start < end}

    def one(number: int) -> tuple[pa.Table, int]:
        rows = winners.rows.take(mine[number])
        return _located_in(receipts[number], units[number], rows, rank[mine[number]])

    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        parts = list(pool.map(one, mine))
    # Back from the units' order to that of the winners.
    table = pa.concat_tables([part for part, _ in parts]).take(pa.array(np.argsort(by_unit, kind="stable")))
    return LocatedSelection(table, sum(size for _, size in parts))


def _located_in(
    receipt: ShardGroupReceipt, unit: ScoreFileReader, rows: ScoreRows, rank: NDArray[np.int64]
) -> tuple[pa.Table, int]:
    found, bytes_read = sample_locations.locate_samples(receipt, rows.sample)
    names = pa.array(unit.shard_names)
    columns = {
        "class": rows.label,
        "rank": rank.astype(np.int32),
        "score": rows.score,
        "position": rows.position,
        "shard": names.take(pa.array(rows.sample >> np.uint64(32))),
        "index": (rows.sample & np.uint64(0xFFFFFFFF)).astype(np.int64),
    }
    return pa.table({**columns, **{name: found[name] for name in sample_locations.SCHEMA.names[1:]}}), bytes_read


class ExcludedSamples(NamedTuple):
    """The samples of one unit that a removal list takes out, in order, and which of the list's keys they have."""

    codes: U64
    keys: NDArray[np.int32]
    bytes_read: int


def find_excluded(keys: list[str], receipt: ShardGroupReceipt) -> ExcludedSamples:
    """Return the samples of a unit that have one of these keys.

    A key that several images share removes them all: for an opt-out, the safe side. Reads the keys of all the unit's
    samples, about five bytes an image, a little at a time: so a key that matches nothing is known to, and at no cost.
    """
    if not keys:
        return ExcludedSamples(NO_SAMPLES, np.empty(0, np.int32), 0)
    wanted = pa.array(keys, pa.string())
    batches, bytes_read = sample_locations.iter_samples(receipt, ["sample", "key"])
    codes, numbers = [NO_SAMPLES], [np.empty(0, np.int32)]
    for batch in batches:
        number = pc.index_in(batch["key"], value_set=wanted)
        codes.append(batch["sample"].filter(number.is_valid()).to_numpy())
        numbers.append(number.drop_null().to_numpy())
    return ExcludedSamples(np.concatenate(codes), np.unique(np.concatenate(numbers)), bytes_read)


def exclusion_stats(keys: list[str], parts: list[ExcludedSamples]) -> ExclusionStats | None:
    """Say how many keys of a removal list match no scored image in any unit; None where there is no list."""
    if not keys:
        return None
    matched = np.zeros(len(keys), bool)
    for part in parts:
        matched[part.keys] = True
    unmatched = np.flatnonzero(~matched)
    return ExclusionStats(
        keys=len(keys), unmatched=len(unmatched), examples=[keys[number] for number in unmatched[:MAX_EXAMPLE_KEYS]]
    )
