"""Merge: the balanced pseudo-labeled set D̂, the exact top K of every class over the whole pool (section 3.2)."""

import io
import json
from collections import Counter
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.merge.select import Candidates, at_random, select
from components.shared import storage
from components.shared.errors import SemiscaleError, TooManyFailures
from components.shared.progress import say
from components.shared.receipts import (
    ClassSelection,
    Ledger,
    PlanReceipt,
    ScoreReceipt,
    SelectionReceipt,
    UnitReceipt,
    load,
)
from components.shared.scores import Rows, UnitScores, ranks
from components.shared.shards import Unit
from components.shared.stage import ReceiptUri, ReceiptUris, StageConfig, digest, once


class MergeConfig(StageConfig):
    """What to select. `random_images` above 0 asks for the control instead: so many images, picked at random."""

    stage: ClassVar[str] = "merge"

    plan: ReceiptUri
    scores: ReceiptUris
    images_per_class: int
    classes_per_image: int
    max_failed_fraction: float
    random_images: int = 0
    seed: int = 0

    def digest(self) -> str:
        """What D̂ depends on: the pool and the teacher, not which pod scored what, nor the plan's labeled side."""
        plan = load(self.plan, PlanReceipt)
        folders = sorted({load(uri, ScoreReceipt).folder.rpartition("/")[2] for uri in self.scores})
        parameters = self.model_dump(include={"images_per_class", "classes_per_image", "random_images", "seed"})
        return digest(self.stage, plan.pool_digest, folders, parameters)


def merge(config: MergeConfig) -> SelectionReceipt:
    """Select D̂ from the scores of all units and write where each winner lies.

    Raises SemiscaleError for a unit without scores or with another teacher's, TooManyFailures where more than
    `max_failed_fraction` of the pool could not be read.
    """
    return once(config, SelectionReceipt, lambda folder: _work(config, folder))


def _work(config: MergeConfig, folder: str) -> dict[str, object]:
    plan = load(config.plan, PlanReceipt)
    receipts = unit_receipts(config, plan)
    failed = balance(receipts, config.max_failed_fraction)
    units = [opened(receipt) for receipt in receipts]
    per_image = min(config.classes_per_image, len(plan.classes))
    if config.random_images:
        winners = at_random(units, config.random_images, config.seed)
    else:
        winners = select(units, len(plan.classes), config.images_per_class, per_image)
    table = located(winners, receipts, units, len(plan.classes))
    uri = storage.join(folder, "selection.parquet")
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write(uri, buffer.getvalue())
    identities = np.stack([winners.unit.astype(np.uint64), winners.rows.sample])
    per_class = class_selections(winners, plan.classes, config.images_per_class)
    scored = sum(shard.scored for receipt in receipts for shard in receipt.shards)
    listed = sum(shard.listed for receipt in receipts for shard in receipt.shards)
    for short in [one for one in per_class if one.found < one.wanted]:
        say("merge", f"class {short.name!r} is short: {short.found} of {short.wanted}")
    return {
        "selection": uri,
        "teacher": receipts[0].teacher,
        "images": len(winners.rows),
        "unique_images": np.unique(identities, axis=1).shape[1],
        "images_per_class": config.images_per_class,
        "classes_per_image": per_image,
        "per_class": per_class,
        "ledger": Ledger(listed=listed, scored=scored, failed=failed.total(), removed=0),
        "failed": dict(failed),
        "bytes_read": sum(unit.bytes_read for unit in units),
    }


def unit_receipts(config: MergeConfig, plan: PlanReceipt) -> list[UnitReceipt]:
    """Load the receipt of every unit in the ledger. Raises SemiscaleError for a hole, by the names of its shards."""
    pods = [load(uri, ScoreReceipt) for uri in config.scores]
    folders = {pod.folder for pod in pods}
    if len(folders) != 1:
        raise SemiscaleError(f"the scores are of {len(folders)} teachers: {', '.join(sorted(folders))}; expected one")
    folder = folders.pop()
    receipts = []
    for content in json.loads(storage.read(plan.units)):
        unit = Unit.model_validate(content)
        data = storage.read_if_there(storage.join(folder, unit.digest, "receipt.json"))
        if data is None:
            names = ", ".join(shard.name for shard in unit.shards[:5])
            raise SemiscaleError(f"unit {unit.digest} has no scores ({names}, …); run the scoring again")
        receipts.append(UnitReceipt.model_validate_json(data))
        refuse_other_shards(unit, receipts[-1])
    return receipts


def refuse_other_shards(unit: Unit, receipt: UnitReceipt) -> None:
    """Raise SemiscaleError where a unit's scores are not of exactly its shards, or do not add up."""
    planned, found = {shard.digest(): shard.name for shard in unit.shards}, {one.digest: one for one in receipt.shards}
    if planned.keys() != found.keys():
        raise SemiscaleError(f"unit {unit.digest}: its scores are of other shards than the plan's; score it again")
    for one in found.values():
        if one.listed != one.scored + sum(one.failed.values()):
            raise SemiscaleError(f"shard {one.shard}: {one.listed} listed, {one.scored} scored, {one.failed} failed")


def balance(receipts: list[UnitReceipt], max_failed_fraction: float) -> Counter[str]:
    """Count the failures of the pool by reason. Raises TooManyFailures above the stated fraction."""
    failed: Counter[str] = Counter()
    for receipt in receipts:
        for shard in receipt.shards:
            failed.update(shard.failed)
    listed = sum(shard.listed for receipt in receipts for shard in receipt.shards)
    if failed.total() > max_failed_fraction * listed:
        first = next(failure for receipt in receipts for failure in receipt.failures)
        raise TooManyFailures(
            f"unlabeled: {failed.total()} of {listed} images failed, more than max_failed_fraction = "
            f"{max_failed_fraction:g} allows; the first: {first.shard} {first.key}: {first.reason}"
        )
    return failed


def opened(receipt: UnitReceipt) -> UnitScores:
    """Open a unit's score file. Raises SemiscaleError where it is not the one its receipt speaks of."""
    unit = UnitScores(receipt.scores)
    if (unit.teacher, unit.unit) != (receipt.teacher, receipt.digest):
        raise SemiscaleError(
            f"{receipt.scores}: scores of unit {unit.unit} by teacher {unit.teacher}; expected "
            f"{receipt.digest} by {receipt.teacher}; score it again"
        )
    return unit


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
        raise SemiscaleError("the pool has no readable image: nothing to select from")
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


def class_selections(winners: Candidates, classes: list[str], wanted: int) -> list[ClassSelection]:
    """Count what was found for each class, and note the score of its last rank."""
    _, counts = ranks(winners.rows.label, len(classes))
    ends = np.cumsum(counts)
    return [
        ClassSelection(
            name=name,
            wanted=wanted,
            found=int(counts[number]),
            last_score=float(winners.rows.score[ends[number] - 1]) if counts[number] else None,
        )
        for number, name in enumerate(classes)
    ]
