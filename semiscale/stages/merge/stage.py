"""Merge: the balanced pseudo-labeled set D̂, the exact top K of every class over the whole pool (section 3.2)."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from semiscale import storage
from semiscale.common.cpu import available_cpus
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data.exclusion_list import read_exclusion_list
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.merge import ClassSelectionStats, SelectionReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ScoreReceipt, ShardGroupReceipt
from semiscale.runtime.run_once import run_once
from semiscale.runtime.stage_config import NOT_FROM_RUN, ReceiptUri, ReceiptUris, StageConfig
from semiscale.scores.score_file import U64, ScoreFileReader, rank_within_class
from semiscale.stages.merge.accounting import count_failures, load_unit_receipts, shard_accounting_table, sum_accounting
from semiscale.stages.merge.locate_winners import exclusion_stats, find_excluded, locate_winners
from semiscale.stages.merge.retrain_gate import keep_or_replace
from semiscale.stages.merge.top_k import MAX_CONCURRENT_READS, Candidates, select_random, select_top_k
from semiscale.storage.documents import load_document
from semiscale.storage.parquet import write_parquet
from semiscale.storage.parquet_row_groups import corrupt_file_error


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
    seed: Annotated[int, NOT_FROM_RUN] = 0
    """Of the control's choice."""

    def digest(self) -> str:
        """What D̂ depends on: the pool and the teacher, not which pod scored what, nor the plan's labeled side."""
        return content_digest(self.stage, load_document(self.plan, PlanReceipt).pool_digest, *self._parts())

    def lineage_digest(self) -> str:
        """What selections of one run share while its pool grows."""
        return content_digest(self.stage, load_document(self.plan, PlanReceipt).name, *self._parts())

    def _parts(self) -> list[object]:
        folders = sorted({load_document(uri, ScoreReceipt).folder.rpartition("/")[2] for uri in self.scores})
        parameters = {"images_per_class", "classes_per_image", "min_probability", "random_images", "seed"}
        keys = read_exclusion_list(self.remove) if self.remove else []
        return [folders, self.model_dump(include=parameters), keys]


def merge(config: MergeConfig) -> SelectionReceipt:
    """Return the D̂ that the run goes on with: that of the pool as it is, or the run's earlier one (see renewal.py)."""
    return keep_or_replace(select_from_pool(config), config.workdir, config.lineage_digest(), config.retrain_above)


def select_from_pool(config: MergeConfig) -> SelectionReceipt:
    """Select D̂ from the scores of all units and write where each winner lies.

    Raises SemiscaleError for a unit without scores or with another teacher's, TooManyBadSamplesError where more than
    `max_failed_fraction` of the pool could not be read.
    """
    receipt = run_once(config, SelectionReceipt, lambda folder: _run(config, folder))
    if receipt.removal and (told := receipt.removal.warning()):
        log_info("merge", told)
    return receipt


def _run(config: MergeConfig, folder: str) -> dict[str, object]:
    plan = load_document(config.plan, PlanReceipt)
    receipts = load_unit_receipts(plan, [load_document(uri, ScoreReceipt) for uri in config.scores])
    progress = Progress("merge", len(receipts), unit="units opened")
    failed = count_failures(receipts, config.max_failed_fraction)
    if not any(receipt.scored for receipt in receipts):
        raise SemiscaleError(
            "SEMI-E301", "unlabeled: The pool has no readable image. Check the failures in the scoring receipts."
        )
    keys = read_exclusion_list(config.remove) if config.remove else []
    with progress.timer("remove"), ThreadPoolExecutor(available_cpus()) as pool:  # decoding the keys is what takes time
        removals = list(pool.map(functools.partial(find_excluded, keys), receipts))
    units: list[ScoreFileReader] = []
    with progress.timer("open"), ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        for unit in pool.map(open_score_file, receipts, [one.codes for one in removals]):
            units.append(unit)
            progress.update(1)
    with progress.timer("select"):
        winners = choose_winners(config, units, len(plan.classes))
    with progress.timer("locate"):
        found = locate_winners(winners, receipts, units, len(plan.classes))
    uri, shards = (storage.join(folder, f"{name}.parquet") for name in ("selection", "ledger"))
    ledger = shard_accounting_table(receipts, [one.codes for one in removals])
    with progress.timer("write"):
        write_parquet(found.table, uri, compression="zstd")
        write_parquet(ledger, shards, compression="zstd")
    images = number_unique_images(winners)
    per_class = class_selection_stats(winners, images, plan.classes, config.images_per_class)
    for short in [one for one in per_class if not one.full]:
        log_info("merge", f"class {short.name!r} is short: {short.found:,} of {short.wanted:,}")
    return {
        "selection": uri,
        "teacher": receipts[0].teacher,
        "images": len(winners),
        "unique_images": int(images.max()) + 1,
        "changed_by_last_tenth": fraction_from_last_tenth(found.table, receipts),
        "images_per_class": config.images_per_class,
        "classes_per_image": min(config.classes_per_image, len(plan.classes)),
        "per_class": per_class,
        "ledger": sum_accounting(ledger),
        "shards": shards,
        "failed": dict(failed),
        "removal": exclusion_stats(keys, removals),
        "bytes_read": sum(unit.bytes_read for unit in units)
        + sum(one.bytes_read for one in removals)
        + found.bytes_read,
    }


def choose_winners(config: MergeConfig, units: list[ScoreFileReader], classes: int) -> Candidates:
    """Return the winners: the top K of each class, or the control's random images."""
    if config.random_images:
        return select_random(units, config.random_images, config.seed)
    least = logit(config.min_probability)
    per_image = min(config.classes_per_image, classes)
    kept = max(unit.classes_kept for unit in units)
    if per_image > kept:
        raise InvalidInputError(
            "SEMI-E302",
            f"classes_per_image: The scores keep the {kept} best classes of each image. Set it to at most {kept}.",
        )
    return select_top_k(units, classes, config.images_per_class, per_image, least)


def logit(probability: float) -> float:
    """Return the score of a softmax probability in [0, 1)."""
    return math.log(probability / (1 - probability)) if probability else -math.inf


def number_unique_images(winners: Candidates) -> NDArray[np.int64]:
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


def fraction_from_last_tenth(selection: pa.Table, receipts: list[ShardGroupReceipt]) -> float:
    """Return the share of D̂ that lies in the last tenth of the shards, in order of their names."""
    names = sorted(shard.shard for receipt in receipts for shard in receipt.shards)
    last = names[len(names) - math.ceil(len(names) / 10) :]
    changed = np.count_nonzero(pc.is_in(selection["shard"], value_set=pa.array(last)).to_numpy())
    return round(changed / len(selection), 4)


def open_score_file(receipt: ShardGroupReceipt, removed: U64) -> ScoreFileReader:
    """Open a unit's score file, without some of its samples. Raises SemiscaleError where its receipt means another."""
    unit = ScoreFileReader(receipt.scores, removed)
    if (unit.teacher, unit.unit) != (receipt.teacher, receipt.digest):
        raise SemiscaleError(
            "SEMI-E303",
            f"{receipt.scores}: It holds scores of shard group {unit.unit} by teacher {unit.teacher}, not of "
            f"{receipt.digest} by {receipt.teacher}. Delete its folder and run the scoring again.",
        )
    if unit.rows != receipt.scored * unit.classes_kept:
        raise corrupt_file_error(
            unit.uri, f"{unit.rows:,} rows; expected {unit.classes_kept} for each of {receipt.scored:,} images"
        )
    return unit


def class_selection_stats(
    winners: Candidates, images: NDArray[np.int64], classes: list[str], wanted: int
) -> list[ClassSelectionStats]:
    """Count what was found for each class, and note its last score; `images` numbers the winners' images."""
    label = winners.rows.label
    _, counts = rank_within_class(label, len(classes))
    ends = np.cumsum(counts)
    unique = np.bincount(label[np.bincount(images)[images] == 1], minlength=len(classes))
    return [
        ClassSelectionStats(
            name=name,
            wanted=wanted,
            found=int(counts[number]),
            unique=int(unique[number]),
            full=bool(counts[number] >= wanted),
            last_score=float(winners.rows.score[ends[number] - 1]) if counts[number] else None,
        )
        for number, name in enumerate(classes)
    ]
