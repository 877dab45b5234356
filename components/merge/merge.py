"""Merge: the balanced pseudo-labeled set D̂, the exact top K of every class over the whole pool (section 3.2)."""

import functools
import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from components.merge.ledger import balance, balanced, lines, unit_receipts
from components.merge.locate import located, removal_of, removed
from components.merge.renewal import settled
from components.merge.select import READERS, Candidates, at_random, select
from components.shared import storage
from components.shared.cores import cores
from components.shared.errors import Refused, SemiscaleError
from components.shared.progress import Progress, say
from components.shared.receipts import (
    ClassSelection,
    PlanReceipt,
    ScoreReceipt,
    SelectionReceipt,
    UnitReceipt,
    load,
)
from components.shared.removal import read_keys
from components.shared.row_groups import damaged
from components.shared.scores import U64, UnitScores, ranks
from components.shared.stage import ReceiptUri, ReceiptUris, StageConfig, digest, once


class MergeConfig(StageConfig):
    """What to select. `remove` is the URI of a list of keys that may not be; below `min_probability` nothing is.

    `random_images` above 0 asks for the control instead: so many images, picked at random.
    """

    stage: ClassVar[str] = "merge"

    plan: ReceiptUri
    """The plan's receipt: every unit of its ledger must have scores."""
    scores: ReceiptUris
    """The receipts of all scoring pods."""
    images_per_class: int = Field(ge=1)
    """K."""
    classes_per_image: int = Field(ge=1)
    """P."""
    max_failed_fraction: float
    """Share of unreadable images in the pool above which nothing is selected."""
    remove: str = ""
    """URI of a text file, one key a line: images never to select."""
    retrain_above: float = Field(default=0.0, ge=0, le=1)
    """Share of the selection that must have changed for it to replace the run's earlier one."""
    min_probability: float = Field(default=0.0, ge=0, lt=1)
    """Softmax probability below which nothing is selected."""
    random_images: int = 0
    """Above 0: the control, so many images picked at random, instead of the top K."""
    seed: int = 0
    """Of the control's choice."""

    def digest(self) -> str:
        """What D̂ depends on: the pool and the teacher, not which pod scored what, nor the plan's labeled side."""
        return digest(self.stage, load(self.plan, PlanReceipt).pool_digest, *self._parts())

    def family(self) -> str:
        """What selections of one run share while its pool grows."""
        return digest(self.stage, load(self.plan, PlanReceipt).name, *self._parts())

    def _parts(self) -> list[object]:
        folders = sorted({load(uri, ScoreReceipt).folder.rpartition("/")[2] for uri in self.scores})
        parameters = {"images_per_class", "classes_per_image", "min_probability", "random_images", "seed"}
        keys = read_keys(self.remove) if self.remove else []
        return [folders, self.model_dump(include=parameters), keys]


def merge(config: MergeConfig) -> SelectionReceipt:
    """Return the D̂ that the run goes on with: that of the pool as it is, or the run's earlier one (see renewal.py)."""
    return settled(selected(config), config.workdir, config.family(), config.retrain_above)


def selected(config: MergeConfig) -> SelectionReceipt:
    """Select D̂ from the scores of all units and write where each winner lies.

    Raises SemiscaleError for a unit without scores or with another teacher's, TooManyFailures where more than
    `max_failed_fraction` of the pool could not be read.
    """
    receipt = once(config, SelectionReceipt, lambda folder: _work(config, folder))
    if receipt.removal and (told := receipt.removal.told()):
        say("merge", told)
    return receipt


def _work(config: MergeConfig, folder: str) -> dict[str, object]:
    plan = load(config.plan, PlanReceipt)
    receipts = unit_receipts(plan, [load(uri, ScoreReceipt) for uri in config.scores])
    progress = Progress("merge", len(receipts), unit="units opened")
    failed = balance(receipts, config.max_failed_fraction)
    if not any(receipt.scored for receipt in receipts):
        raise SemiscaleError("the pool has no readable image: nothing to select from")
    keys = read_keys(config.remove) if config.remove else []
    with progress.timed("remove"), ThreadPoolExecutor(cores()) as pool:  # decoding the keys is what takes time
        removals = list(pool.map(functools.partial(removed, keys), receipts))
    units: list[UnitScores] = []
    with progress.timed("open"), ThreadPoolExecutor(READERS) as pool:
        for unit in pool.map(opened, receipts, [one.codes for one in removals]):
            units.append(unit)
            progress.add(1)
    with progress.timed("select"):
        winners = chosen(config, units, len(plan.classes))
    with progress.timed("locate"):
        found = located(winners, receipts, units, len(plan.classes))
    uri, shards = (storage.join(folder, f"{name}.parquet") for name in ("selection", "ledger"))
    ledger = lines(receipts, [one.codes for one in removals])
    with progress.timed("write"):
        write_table(found.table, uri)
        write_table(ledger, shards)
    images = image_numbers(winners)
    per_class = class_selections(winners, images, plan.classes, config.images_per_class)
    for short in [one for one in per_class if not one.full]:
        say("merge", f"class {short.name!r} is short: {short.found:,} of {short.wanted:,}")
    return {
        "selection": uri,
        "teacher": receipts[0].teacher,
        "images": len(winners),
        "unique_images": int(images.max()) + 1,
        "changed_by_last_tenth": share_of_last_tenth(found.table, receipts),
        "images_per_class": config.images_per_class,
        "classes_per_image": min(config.classes_per_image, len(plan.classes)),
        "per_class": per_class,
        "ledger": balanced(ledger),
        "shards": shards,
        "failed": dict(failed),
        "removal": removal_of(keys, removals),
        "bytes_read": sum(unit.bytes_read for unit in units)
        + sum(one.bytes_read for one in removals)
        + found.bytes_read,
    }


def chosen(config: MergeConfig, units: list[UnitScores], classes: int) -> Candidates:
    """Return the winners: the top K of each class, or the control's random images."""
    if config.random_images:
        return at_random(units, config.random_images, config.seed)
    least = log_odds(config.min_probability)
    per_image = min(config.classes_per_image, classes)
    kept = max(unit.classes_kept for unit in units)
    if per_image > kept:
        raise Refused(f"the scores keep the {kept} best classes of each image; classes_per_image can be at most {kept}")
    return select(units, classes, config.images_per_class, per_image, least)


def log_odds(probability: float) -> float:
    """Return the score of a softmax probability in [0, 1)."""
    return math.log(probability / (1 - probability)) if probability else -math.inf


def image_numbers(winners: Candidates) -> NDArray[np.int64]:
    """Number the images: one number for each winner, the same for the same image, in order of (unit, sample).

    Time: a sort of the winners.
    """
    order = np.lexsort((winners.rows.sample, winners.unit))
    sample, unit = winners.rows.sample[order], winners.unit[order]
    new = np.ones(len(order), bool)
    new[1:] = (sample[1:] != sample[:-1]) | (unit[1:] != unit[:-1])
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(new) - 1
    return numbers


def share_of_last_tenth(selection: pa.Table, receipts: list[UnitReceipt]) -> float:
    """Return the share of D̂ that lies in the last tenth of the shards, in order of their names."""
    names = sorted(shard.shard for receipt in receipts for shard in receipt.shards)
    last = names[len(names) - math.ceil(len(names) / 10) :]
    changed = np.count_nonzero(pc.is_in(selection["shard"], value_set=pa.array(last)).to_numpy())
    return round(changed / len(selection), 4)


def write_table(table: pa.Table, uri: str) -> None:
    """Write a table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write(uri, buffer.getvalue())


def opened(receipt: UnitReceipt, removed: U64) -> UnitScores:
    """Open a unit's score file, without some of its samples. Raises SemiscaleError where its receipt means another."""
    unit = UnitScores(receipt.scores, removed)
    if (unit.teacher, unit.unit) != (receipt.teacher, receipt.digest):
        raise SemiscaleError(
            f"{receipt.scores}: scores of unit {unit.unit} by teacher {unit.teacher}; expected "
            f"{receipt.digest} by {receipt.teacher}; score it again"
        )
    if unit.rows != receipt.scored * unit.classes_kept:
        raise damaged(
            unit.uri, f"{unit.rows:,} rows; expected {unit.classes_kept} for each of {receipt.scored:,} images"
        )
    return unit


def class_selections(
    winners: Candidates, images: NDArray[np.int64], classes: list[str], wanted: int
) -> list[ClassSelection]:
    """Count what was found for each class, and note its last score; `images` numbers the winners' images."""
    label = winners.rows.label
    _, counts = ranks(label, len(classes))
    ends = np.cumsum(counts)
    unique = np.bincount(label[np.bincount(images)[images] == 1], minlength=len(classes))
    return [
        ClassSelection(
            name=name,
            wanted=wanted,
            found=int(counts[number]),
            unique=int(unique[number]),
            full=bool(counts[number] >= wanted),
            last_score=float(winners.rows.score[ends[number] - 1]) if counts[number] else None,
        )
        for number, name in enumerate(classes)
    ]
