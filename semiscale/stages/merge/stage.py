"""Select the balanced pseudo-labeled set D̂ (section 3.2).

D̂ has the exact top K images of every class over the whole pool.
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from semiscale.stages.merge.accounting import (
    count_failures,
    load_group_receipts,
    shard_accounting_table,
    sum_accounting,
)
from semiscale.stages.merge.locate_winners import (
    ExcludedSamples,
    LocatedSelection,
    exclusion_stats,
    find_excluded,
    locate_winners,
)
from semiscale.stages.merge.retrain_gate import keep_or_replace
from semiscale.stages.merge.top_k import MAX_CONCURRENT_READS, Candidates, select_random, select_top_k
from semiscale.storage.documents import load_document
from semiscale.storage.parquet import write_parquet
from semiscale.storage.parquet_row_groups import corrupt_file_error


class MergeConfig(StageConfig):
    """Inputs of the selection."""

    stage: ClassVar[str] = "merge"

    plan: ReceiptUri
    """The plan's receipt. All its shard groups must have scores."""
    scores: ReceiptUris
    """The receipts of all scoring pods."""
    images_per_class: int = Field(ge=1)
    """K."""
    classes_per_image: int = Field(ge=1)
    """P."""
    max_failed_fraction: float
    """Share of unreadable images in the pool above which nothing is selected."""
    remove: str = ""
    """URI of a text file with one key per line. Images with these keys are never selected."""
    retrain_above: float = Field(default=0.0, ge=0, le=1)
    """Share of the selection that must have changed for it to replace the run's earlier one."""
    min_probability: float = Field(default=0.0, ge=0, lt=1)
    """Softmax probability below which nothing is selected."""
    random_images: int = 0
    """Number of images of the control experiment, which are drawn at random instead of the top K. 0 selects the top K.
    """
    seed: Annotated[int, NOT_FROM_RUN] = 0
    """Seed of the control experiment."""

    def digest(self) -> str:
        """Return the digest of all that D̂ depends on.

        It covers the pool and the teacher. It does not cover which pod scored what, nor the labeled side of the plan.
        """
        return content_digest(self.stage, load_document(self.plan, PlanReceipt).pool_digest, *self._digest_parts())

    def lineage_digest(self) -> str:
        """Return the digest that the selections of one run share while its pool grows."""
        return content_digest(self.stage, load_document(self.plan, PlanReceipt).name, *self._digest_parts())

    def _digest_parts(self) -> list[object]:
        folders = sorted({load_document(uri, ScoreReceipt).folder.rpartition("/")[2] for uri in self.scores})
        parameters = {"images_per_class", "classes_per_image", "min_probability", "random_images", "seed"}
        keys = read_exclusion_list(self.remove) if self.remove else []
        return [folders, self.model_dump(include=parameters), keys]


def merge(config: MergeConfig) -> SelectionReceipt:
    """Select D̂ from the pool, or keep the earlier one of the run.

    The earlier D̂ is kept if too little has changed, which retrain_gate.py decides.

    Args:
        config: The inputs of the selection.

    Returns:
        The receipt of the selection that the later stages use.

    Raises:
        InvalidInputError: `classes_per_image` is larger than the number of classes that the scores keep.
        SemiscaleError: A shard group has no valid scores of this teacher, or no image can be selected.
        TooManyBadSamplesError: More than `max_failed_fraction` of the pool could not be read.
    """
    return keep_or_replace(select_from_pool(config), config.workdir, config.lineage_digest(), config.retrain_above)


def select_from_pool(config: MergeConfig) -> SelectionReceipt:
    """Select D̂ from all scores and write the locations of its images.

    Args:
        config: The inputs of the selection.

    Returns:
        The receipt of the selection.

    Raises:
        InvalidInputError: `classes_per_image` is larger than the number of classes that the scores keep.
        SemiscaleError: A shard group has no valid scores of this teacher, or no image can be selected.
        TooManyBadSamplesError: More than `max_failed_fraction` of the pool could not be read.

    Cost:
        The selection reads the scores that top_k.py states, and the locations that locate_winners.py states. A removal
        list adds the keys of all images.
    """
    receipt = run_once(config, SelectionReceipt, partial(_select_and_write, config))
    if receipt.removal and (warning := receipt.removal.warning()):
        log_info("merge", warning)
    return receipt


def _select_and_write(config: MergeConfig, folder: str) -> dict[str, object]:
    """Select D̂, write its files to a folder, and return the fields of the receipt."""
    plan = load_document(config.plan, PlanReceipt)
    receipts = load_group_receipts(plan, [load_document(uri, ScoreReceipt) for uri in config.scores])
    progress = Progress("merge", len(receipts), unit="shard groups")

    pool = _open_pool(config, receipts, progress)
    with progress.timer("select"):
        winners = choose_winners(config, pool.score_files, len(plan.classes))
    with progress.timer("locate"):
        selection = locate_winners(winners, receipts, pool.score_files, len(plan.classes))

    manifest_uri, accounting_uri = (storage.join(folder, f"{name}.parquet") for name in ("selection", "ledger"))
    accounting = shard_accounting_table(receipts, [samples.codes for samples in pool.excluded])
    with progress.timer("write"):
        write_parquet(selection.table, manifest_uri, compression="zstd")
        write_parquet(accounting, accounting_uri, compression="zstd")

    return {
        "selection": manifest_uri,
        "shards": accounting_uri,
        "ledger": sum_accounting(accounting),
        **_summarize(config, plan.classes, pool, winners, selection),
    }


@dataclass(frozen=True)
class _ScoredPool:
    """The pool as the selection reads it.

    Attributes:
        receipts: The receipts of the shard groups.
        failed: The number of failed images by reason.
        removal_keys: The removal list.
        excluded: The samples of each shard group that the removal list excludes.
        score_files: The score file of each shard group, without its excluded samples.
    """

    receipts: list[ShardGroupReceipt]
    failed: Counter[str]
    removal_keys: list[str]
    excluded: list[ExcludedSamples]
    score_files: list[ScoreFileReader]


def _open_pool(config: MergeConfig, receipts: list[ShardGroupReceipt], progress: Progress) -> _ScoredPool:
    """Check the failures, apply the removal list, and open all score files."""
    failed = count_failures(receipts, config.max_failed_fraction)
    if not any(receipt.scored for receipt in receipts):
        raise SemiscaleError(
            "SEMI-E301", "unlabeled: The pool has no readable image. Check the failures in the scoring receipts."
        )

    keys = read_exclusion_list(config.remove) if config.remove else []
    # One thread per CPU, because decoding the keys takes the time.
    with progress.timer("remove"), ThreadPoolExecutor(available_cpus()) as pool:
        excluded = list(pool.map(partial(find_excluded, keys), receipts))

    score_files: list[ScoreFileReader] = []
    with progress.timer("open"), ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        for score_file in pool.map(open_score_file, receipts, [samples.codes for samples in excluded]):
            score_files.append(score_file)
            progress.update(1)
    return _ScoredPool(receipts, failed, keys, excluded, score_files)


def choose_winners(config: MergeConfig, score_files: list[ScoreFileReader], classes: int) -> Candidates:
    """Return the top K of each class, or the random images of the control experiment.

    Args:
        config: The inputs of the selection.
        score_files: The score files of all shard groups, unread.
        classes: The number of classes.

    Raises:
        InvalidInputError: `classes_per_image` is larger than the number of classes that the scores keep.
        SemiscaleError: A score file is damaged.
    """
    if config.random_images:
        return select_random(score_files, config.random_images, config.seed)
    classes_per_image = min(config.classes_per_image, classes)
    classes_kept = max(score_file.classes_kept for score_file in score_files)
    if classes_per_image > classes_kept:
        raise InvalidInputError(
            "SEMI-E302",
            f"classes_per_image: The scores keep the {classes_kept} best classes of each image. "
            f"Set it to at most {classes_kept}.",
        )
    min_score = logit(config.min_probability)
    return select_top_k(score_files, classes, config.images_per_class, classes_per_image, min_score)


def logit(probability: float) -> float:
    """Return the log-odds of a softmax probability in [0, 1)."""
    return math.log(probability / (1 - probability)) if probability else -math.inf


def open_score_file(receipt: ShardGroupReceipt, removed: U64) -> ScoreFileReader:
    """Open the score file of a shard group.

    Args:
        receipt: The receipt of the shard group.
        removed: The codes of samples that are skipped.

    Raises:
        SemiscaleError: The file is missing or damaged, or does not belong to the receipt.
    """
    score_file = ScoreFileReader(receipt.scores, removed)
    if (score_file.teacher, score_file.unit) != (receipt.teacher, receipt.digest):
        raise SemiscaleError(
            "SEMI-E303",
            f"{receipt.scores}: It holds scores of shard group {score_file.unit} by teacher {score_file.teacher}, not "
            f"of {receipt.digest} by {receipt.teacher}. Delete its folder and run the scoring again.",
        )
    if score_file.rows != receipt.scored * score_file.classes_kept:
        raise corrupt_file_error(
            score_file.uri,
            f"{score_file.rows:,} rows; expected {score_file.classes_kept} for each of {receipt.scored:,} images",
        )
    return score_file


def _summarize(
    config: MergeConfig, classes: list[str], pool: _ScoredPool, winners: Candidates, selection: LocatedSelection
) -> dict[str, object]:
    """Log the classes that are short, and return the counts of the receipt."""
    images = number_unique_images(winners)
    per_class = class_selection_stats(winners, images, classes, config.images_per_class)
    for stats in per_class:
        if not stats.full:
            log_info("merge", f"class {stats.name!r} is short: {stats.found:,} of {stats.wanted:,}")
    score_bytes = sum(score_file.bytes_read for score_file in pool.score_files)
    key_bytes = sum(samples.bytes_read for samples in pool.excluded)
    return {
        "teacher": pool.receipts[0].teacher,
        "images": len(winners),
        "unique_images": int(images.max()) + 1,
        "changed_by_last_tenth": fraction_from_last_tenth(selection.table, pool.receipts),
        "images_per_class": config.images_per_class,
        "classes_per_image": min(config.classes_per_image, len(classes)),
        "per_class": per_class,
        "failed": dict(pool.failed),
        "removal": exclusion_stats(pool.removal_keys, pool.excluded),
        "bytes_read": score_bytes + key_bytes + selection.bytes_read,
    }


def number_unique_images(winners: Candidates) -> NDArray[np.int64]:
    """Return a number for each winner, which is equal for equal images.

    The numbers are in order of the shard group and the sample, from 0.

    Cost:
        One sort of the winners.
    """
    order = np.lexsort((winners.rows.sample, winners.group))
    sample, group = winners.rows.sample[order], winners.group[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (sample[1:] != sample[:-1]) | (group[1:] != group[:-1])
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    return numbers


def class_selection_stats(
    winners: Candidates, images: NDArray[np.int64], classes: list[str], wanted: int
) -> list[ClassSelectionStats]:
    """Count the winners of each class.

    Args:
        winners: The winners, sorted by class and rank.
        images: The number of the image of each winner.
        classes: The names of the classes.
        wanted: K.
    """
    label = winners.rows.label
    _, counts = rank_within_class(label, len(classes))
    ends = np.cumsum(counts)
    # An image that is selected once belongs to a single class.
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


def fraction_from_last_tenth(selection: pa.Table, receipts: list[ShardGroupReceipt]) -> float:
    """Return the share of D̂ that lies in the last tenth of the shards, by name.

    Args:
        selection: D̂, with the column `shard`.
        receipts: The receipts of all shard groups.
    """
    names = sorted(shard.shard for receipt in receipts for shard in receipt.shards)
    last = names[len(names) - math.ceil(len(names) / 10) :]
    rows = np.count_nonzero(pc.is_in(selection["shard"], value_set=pa.array(last)).to_numpy())
    return round(rows / len(selection), 4)
