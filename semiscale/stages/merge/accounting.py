"""The ledger of the scan: every unit's receipt, of the planned shards and the one teacher, and what they add up to."""

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


def load_unit_receipts(plan: PlanReceipt, pods: list[ScoreReceipt]) -> list[ShardGroupReceipt]:
    """Load the receipt of every unit of the plan, READERS at a time: a thousand in seconds where each takes a tenth.

    Of a unit that has pieces, theirs: the merge takes them for units.

    Raises SemiscaleError for a hole, by the names of its shards, and for scores of other shards or another teacher.
    """
    teachers = sorted({f"{pod.teacher} in {pod.folder}" for pod in pods})
    if len(teachers) != 1:
        raise SemiscaleError(
            "SEMI-E304",
            f"scores: They are of {len(teachers)} teachers: {', '.join(teachers)}. Give scores of one teacher.",
        )
    units = [ShardGroup.model_validate(content) for content in json.loads(storage.read_bytes(plan.units))]
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        receipts = pool.map(partial(load_unit_receipt, pods[0]), units)
        return [piece for receipt in receipts for piece in receipt.pieces or [receipt]]


def load_unit_receipt(pod: ScoreReceipt, unit: ShardGroup) -> ShardGroupReceipt:
    """Load the receipt of a unit from the folder that the pods share."""
    folder = storage.join(pod.folder, unit.digest)
    data = storage.read_or_none(storage.join(folder, "receipt.json"))
    if data is None:
        names = ", ".join(shard.name for shard in unit.shards[:5])
        raise SemiscaleError(
            "SEMI-E305", f"shard group {unit.digest}: It has no scores ({names}, …). Run the scoring again."
        )
    receipt = ShardGroupReceipt.model_validate_json(data)
    if (receipt.teacher, receipt.digest) != (pod.teacher, unit.digest):
        raise SemiscaleError(
            "SEMI-E303",
            f"{folder}/receipt.json: It is of shard group {receipt.digest} by teacher {receipt.teacher}, not of "
            f"{unit.digest} by {pod.teacher}. Delete the folder and run the scoring again.",
        )
    check_shards_match(unit, receipt)
    return receipt


def check_shards_match(unit: ShardGroup, receipt: ShardGroupReceipt) -> None:
    """Raise SemiscaleError where a unit's scores are not of exactly its shards, or do not add up."""
    found = [one for piece in receipt.pieces or [receipt] for one in piece.shards]
    if sorted(shard.digest() for shard in unit.shards) != sorted(one.digest for one in found):
        raise SemiscaleError(
            "SEMI-E306", f"shard group {unit.digest}: Its scores are of other shards than the plan's. Score it again."
        )
    for one in found:
        one.check_complete()


def count_failures(receipts: list[ShardGroupReceipt], max_failed_fraction: float) -> Counter[str]:
    """Count the failures of the pool by reason. Raises TooManyBadSamplesError above the stated fraction."""
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
            f"{max_failed_fraction:g} allows. Mend them, first {first.shard} {first.key} ({first.reason}), "
            "or raise the fraction.",
        )
    return failed


def shard_accounting_table(receipts: list[ShardGroupReceipt], removed: list[U64]) -> pa.Table:
    """Return the ledger of the pool, one line a shard in order of their names: listed = scored + failed + removed.

    `removed` are the codes of the samples of each unit that were scored and may not be selected: they count as removed.
    """
    shards = [shard for receipt in receipts for shard in receipt.shards]
    of_units = zip(removed, receipts, strict=True)
    gone = [np.bincount((codes >> np.uint64(32)).astype(int), minlength=len(one.shards)) for codes, one in of_units]
    columns = {
        "shard": [shard.shard for shard in shards],
        "listed": [shard.listed for shard in shards],
        "scored": np.array([shard.scored for shard in shards]) - np.concatenate(gone),
        "failed": [sum(shard.failed.values()) for shard in shards],
        "removed": np.concatenate(gone),
    }
    return pa.table(columns).sort_by("shard")


def sum_accounting(lines: pa.Table) -> PoolAccounting:
    """Add up the ledger."""
    return PoolAccounting(**{name: pc.sum(lines[name]).as_py() for name in PoolAccounting.model_fields})
