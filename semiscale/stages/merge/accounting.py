"""Check that the whole pool has scores of one teacher, and count its images.

The receipts of the shard groups are compared with the plan. Each shard must add up: listed = scored + failed + removed.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semiscale import storage
from semiscale.common.errors import SemiscaleError, TooManyBadSamplesError
from semiscale.data.shard import ShardGroup
from semiscale.receipts.merge import PoolAccounting
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ScoreReceipt, ShardGroupReceipt
from semiscale.scores.score_file import U64
from semiscale.stages.merge.top_k import MAX_CONCURRENT_READS


def load_group_receipts(plan: PlanReceipt, pods: list[ScoreReceipt]) -> list[ShardGroupReceipt]:
    """Load the receipts of all shard groups of the plan.

    A shard group that was too large to be ranked at once has pieces with a receipt each. They are returned in its
    place, because the merge treats them as shard groups.

    Args:
        plan: The plan's receipt.
        pods: The receipts of the scoring pods.

    Raises:
        SemiscaleError: A shard group has no scores, or scores of other shards or of another teacher.

    Cost:
        One request a shard group, `MAX_CONCURRENT_READS` at the same time. A thousand take seconds if each request
        takes a tenth of a second.
    """
    teachers = sorted({f"{pod.teacher} in {pod.folder}" for pod in pods})
    if len(teachers) != 1:
        raise SemiscaleError(
            "SEMI-E304",
            f"scores: They are of {len(teachers)} teachers: {', '.join(teachers)}. Give scores of one teacher.",
        )
    groups = [ShardGroup.model_validate(content) for content in json.loads(storage.read_bytes(plan.units))]
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        receipts = pool.map(partial(_load_group_receipt, pods[0]), groups)
        return [piece for receipt in receipts for piece in receipt.pieces or [receipt]]


def _load_group_receipt(pod: ScoreReceipt, group: ShardGroup) -> ShardGroupReceipt:
    """Load the receipt of a shard group from the score folder, which all pods share."""
    folder = storage.join(pod.folder, group.digest)
    data = storage.read_or_none(storage.join(folder, "receipt.json"))
    if data is None:
        names = ", ".join(shard.name for shard in group.shards[:5])
        raise SemiscaleError(
            "SEMI-E305", f"shard group {group.digest}: It has no scores ({names}, …). Run the scoring again."
        )
    receipt = ShardGroupReceipt.model_validate_json(data)
    if (receipt.teacher, receipt.digest) != (pod.teacher, group.digest):
        raise SemiscaleError(
            "SEMI-E303",
            f"{folder}/receipt.json: It is of shard group {receipt.digest} by teacher {receipt.teacher}, not of "
            f"{group.digest} by {pod.teacher}. Delete the folder and run the scoring again.",
        )
    _check_shards_match(group, receipt)
    return receipt


def _check_shards_match(group: ShardGroup, receipt: ShardGroupReceipt) -> None:
    """Check that a receipt has the shards of its group, and that each adds up.

    Raises:
        SemiscaleError: It has other shards, or the images of a shard do not add up.
    """
    counts = [count for piece in receipt.pieces or [receipt] for count in piece.shards]
    if sorted(shard.digest() for shard in group.shards) != sorted(count.digest for count in counts):
        raise SemiscaleError(
            "SEMI-E306", f"shard group {group.digest}: Its scores are of other shards than the plan's. Score it again."
        )
    for count in counts:
        count.check_complete()


def count_failures(receipts: list[ShardGroupReceipt], max_failed_fraction: float) -> Counter[str]:
    """Count the failed images of the pool by reason.

    Args:
        receipts: The receipts of all shard groups.
        max_failed_fraction: The share of the listed images that may have failed.

    Raises:
        TooManyBadSamplesError: More images failed.
    """
    failed: Counter[str] = Counter()
    for receipt in receipts:
        for shard in receipt.shards:
            failed.update(shard.failed)
    listed = sum(shard.listed for receipt in receipts for shard in receipt.shards)
    if failed.total() > max_failed_fraction * listed:
        first = next(failure for receipt in receipts for failure in receipt.failures)
        raise TooManyBadSamplesError(
            "SEMI-E307",
            f"unlabeled: {failed.total()} of {listed} images failed, more than max_failed_fraction = "
            f"{max_failed_fraction:g} allows. The first is {first.location()} ({first.reason}). Repair or remove the "
            "images, or raise max_failed_fraction. Then run it again under the same name: finished work is reused.",
        )
    return failed


def shard_accounting_table(receipts: list[ShardGroupReceipt], removed: list[U64]) -> pa.Table:
    """Return the accounting of the pool, with one row per shard.

    Args:
        receipts: The receipts of all shard groups.
        removed: The codes of the removed samples of each shard group. The receipt counts them as scored, and the table
            counts them as removed.

    Returns:
        A table with the columns shard, listed, scored, failed and removed, sorted by shard.
    """
    shards = [shard for receipt in receipts for shard in receipt.shards]
    # The high half of a code is the number of the shard in its shard group.
    removed_counts = np.concatenate(
        [
            np.bincount((codes >> np.uint64(32)).astype(int), minlength=len(receipt.shards))
            for codes, receipt in zip(removed, receipts, strict=True)
        ]
    )
    columns = {
        "shard": [shard.shard for shard in shards],
        "listed": [shard.listed for shard in shards],
        "scored": np.array([shard.scored for shard in shards]) - removed_counts,
        "failed": [sum(shard.failed.values()) for shard in shards],
        "removed": removed_counts,
    }
    return pa.table(columns).sort_by("shard")


def sum_accounting(rows: pa.Table) -> PoolAccounting:
    """Add up the accounting of all shards."""
    return PoolAccounting(**{name: pc.sum(rows[name]).as_py() for name in PoolAccounting.model_fields})
