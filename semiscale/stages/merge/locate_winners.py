"""Locate the winners of the selection and the samples of a removal list.

A winner is a sample of a shard group, given by its code. The files of the shard group (semiscale/scores/
sample_locations.py) turn the code into a shard, a key and a byte range.
"""

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

# Keys that match no image, as examples in the receipt.
MAX_EXAMPLE_KEYS = 5


class LocatedSelection(NamedTuple):
    """D̂ with the locations of its images, and the number of bytes read for them."""

    table: pa.Table
    bytes_read: int


def locate_winners(
    winners: Candidates, receipts: list[ShardGroupReceipt], score_files: list[ScoreFileReader], classes: int
) -> LocatedSelection:
    """Return D̂ as a table with the locations of its images.

    The table has one row for each (image, class), sorted by class and rank.

    Args:
        winners: The selected rows, sorted by class and rank.
        receipts: The receipts of the shard groups.
        score_files: The score files of the same shard groups.
        classes: The number of classes.

    Raises:
        SemiscaleError: There are no winners, or a file of locations is missing or damaged.

    Cost:
        Reads the locations of as many bands as the selection needed, from the shard groups that have winners. This is
        about three times the size of the winners' own locations. Memory for the table twice, about 100 bytes a winner.
    """
    if not len(winners):
        raise SemiscaleError(
            "SEMI-E300",
            "unlabeled: Every image is unreadable, removed or below min_probability. Add images or lower it.",
        )
    rank, _ = rank_within_class(winners.rows.label, classes)
    by_group = np.argsort(winners.group, kind="stable")
    offsets = np.searchsorted(winners.group[by_group], np.arange(len(score_files) + 1))
    rows_of_group = {
        number: by_group[start:end] for number, (start, end) in enumerate(pairwise(offsets)) if start < end
    }

    def locate(number: int) -> tuple[pa.Table, int]:
        chosen = rows_of_group[number]
        return _locate_in_group(receipts[number], score_files[number], winners.rows.take(chosen), rank[chosen])

    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        parts = list(pool.map(locate, rows_of_group))
    # The parts are in order of the shard groups. The inverse permutation restores the order of the winners.
    table = pa.concat_tables([part for part, _ in parts]).take(pa.array(np.argsort(by_group, kind="stable")))
    return LocatedSelection(table, sum(size for _, size in parts))


def _locate_in_group(
    receipt: ShardGroupReceipt, score_file: ScoreFileReader, rows: ScoreRows, rank: NDArray[np.int64]
) -> tuple[pa.Table, int]:
    """Return the rows of D̂ that lie in one shard group, and the number of bytes read."""
    locations, bytes_read = sample_locations.locate_samples(receipt, rows.sample)
    names = pa.array(score_file.shard_names)
    columns = {
        "class": rows.label,
        "rank": rank.astype(np.int32),
        "score": rows.score,
        "position": rows.position,
        "shard": names.take(pa.array(rows.sample >> np.uint64(32))),
        "index": (rows.sample & np.uint64(0xFFFFFFFF)).astype(np.int64),
    }
    return pa.table({**columns, **{name: locations[name] for name in sample_locations.SCHEMA.names[1:]}}), bytes_read


class ExcludedSamples(NamedTuple):
    """The samples of one shard group that a removal list excludes.

    Attributes:
        codes: The codes of the samples, in ascending order.
        keys: The numbers of the list's keys that these samples have.
        bytes_read: The number of bytes that were read.
    """

    codes: U64
    keys: NDArray[np.int32]
    bytes_read: int


def find_excluded(keys: list[str], receipt: ShardGroupReceipt) -> ExcludedSamples:
    """Return the samples of a shard group that have one of these keys.

    A key that several images share excludes all of them. This is the safe choice for an opt-out.

    Args:
        keys: The removal list.
        receipt: The receipt of the shard group.

    Raises:
        SemiscaleError: The file of the samples is missing or damaged.

    Cost:
        Reads the keys of all samples, about five bytes an image, in batches. This also shows which keys match nothing.
        Without keys it reads nothing.
    """
    if not keys:
        return ExcludedSamples(NO_SAMPLES, np.empty(0, np.int32), 0)
    value_set = pa.array(keys, pa.string())
    batches, bytes_read = sample_locations.iter_samples(receipt, ["sample", "key"])
    codes, numbers = [NO_SAMPLES], [np.empty(0, np.int32)]
    for batch in batches:
        number = pc.index_in(batch["key"], value_set=value_set)
        codes.append(batch["sample"].filter(number.is_valid()).to_numpy())
        numbers.append(number.drop_null().to_numpy())
    return ExcludedSamples(np.concatenate(codes), np.unique(np.concatenate(numbers)), bytes_read)


def exclusion_stats(keys: list[str], parts: list[ExcludedSamples]) -> ExclusionStats | None:
    """Count the keys of a removal list that match no scored image.

    Args:
        keys: The removal list.
        parts: The excluded samples of each shard group.

    Returns:
        The counts, or None without a list.
    """
    if not keys:
        return None
    matched = np.zeros(len(keys), bool)
    for part in parts:
        matched[part.keys] = True
    unmatched = np.flatnonzero(~matched)
    return ExclusionStats(
        keys=len(keys), unmatched=len(unmatched), examples=[keys[number] for number in unmatched[:MAX_EXAMPLE_KEYS]]
    )
