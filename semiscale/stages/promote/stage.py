"""Promote: the student becomes the champion if it is not worse on the same test images."""

import time
from datetime import UTC, datetime
from typing import ClassVar

from semiscale import storage
from semiscale.config.run_parameters import Promotion
from semiscale.data.shard import SampleFields
from semiscale.evaluation import metrics
from semiscale.evaluation.prediction_cache import SplitEvaluator
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.evaluate import EvaluationReceipt, PairedComparison
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.stage_config import ReceiptUri, StageConfig
from semiscale.stages.promote.champion import Champion, ChampionRecord, champion_uri, promote_record, update_champion
from semiscale.storage.documents import load_document

SIGNIFICANCE_LEVEL = 0.05  # of the one-sided test: a student as good as the champion is turned down so often


class PromoteConfig(StageConfig):
    """Whose student is to be compared with which champion."""

    stage: ClassVar[str] = "promote"
    on_device: ClassVar[bool] = True

    plan: ReceiptUri
    """The plan's receipt: it names the test split and the run."""
    evaluation: ReceiptUri
    """The evaluation's receipt: it names the student."""
    promotion: Promotion = "if-not-worse"
    """if-not-worse, or never: the comparison alone."""
    champion: str = ""
    """Name of the champion; empty: the run's."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""
    force: bool = False
    """Promote the student whatever the comparison says."""


def promote(config: PromoteConfig) -> PromotionReceipt:
    """Compare the student with the champion, or with the run's baseline where there is no champion yet, and promote it
    unless it is worse.

    It is worse where McNemar's exact test on the same test images, one-sided, says so at LEVEL: of two equally good
    models the new one, which has seen the newer data, is preferred. A model that was rolled back is promoted by force
    alone. Always done anew: it costs two small files, and a forward pass over the test images where the champion was
    never measured on them.
    """
    started = time.monotonic()
    plan, evaluation = load_document(config.plan, PlanReceipt), load_document(config.evaluation, EvaluationReceipt)
    student = load_document(evaluation.models["student"].training, TrainReceipt)
    uri = champion_uri(config.workdir, config.champion or plan.name)
    verdicts: list[tuple[bool, str, PairedComparison | None]] = []

    def change(champion: Champion | None) -> Champion | None:
        comparison = compare_with_champion(config, champion, student)
        promoted, why = decide(config, champion, student, comparison)
        verdicts.append((promoted, why, comparison))
        return promote_record(champion, champion_record(plan, evaluation, student, why)) if promoted else None

    update_champion(uri, change)
    promoted, why, comparison = verdicts[-1]
    log_info("promote", f"{'promoted' if promoted else 'not promoted'}: {why}")
    return PromotionReceipt(
        stage=config.stage,
        digest=config.digest(),
        folder=storage.join(config.workdir, plan.name),
        seconds=round(time.monotonic() - started, 3),
        champion=uri,
        model=student.digest,
        promoted=promoted,
        why=why,
        comparison=comparison,
    )


def compare_with_champion(
    config: PromoteConfig, champion: Champion | None, student: TrainReceipt
) -> PairedComparison | None:
    """Compare the student with the champion on this run's test images; None where the two cannot be compared."""
    plan, evaluation = load_document(config.plan, PlanReceipt), load_document(config.evaluation, EvaluationReceipt)
    name = "champion" if champion else "baseline"
    other = load_document(
        champion.current.training if champion else evaluation.models["baseline"].training, TrainReceipt
    )
    if other.digest == student.digest or other.classes != student.classes:
        return None
    columns = SampleFields(config.image_column, config.label_column, plan.is_video)
    exam = SplitEvaluator(config.workdir, plan.test, columns, Progress("promote", 2 * plan.test.samples))
    return metrics.compare_paired("student", exam.predict(student).correct(), name, exam.predict(other).correct())


def champion_record(
    plan: PlanReceipt, evaluation: EvaluationReceipt, student: TrainReceipt, why: str
) -> ChampionRecord:
    """Return what the champions' object says of the student from now on."""
    return ChampionRecord(
        model=student.digest,
        checkpoint=student.checkpoint,
        training=evaluation.models["student"].training,
        run=plan.name,
        test=plan.test.digest,
        top1=evaluation.models["student"].top1,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        why=why,
    )


def decide(
    config: PromoteConfig, champion: Champion | None, student: TrainReceipt, comparison: PairedComparison | None
) -> tuple[bool, str]:
    """Decide whether the student is promoted, and say why."""
    if champion and champion.current.model == student.digest:
        return False, "the student is the champion already"
    if config.force:
        return True, "by force"
    if comparison is None:
        return False, "the champion has other classes; `promote --force` replaces it"
    found = f"{comparison.wins} test images won, {comparison.losses} lost, p = {comparison.p_worse:.3g} one-sided"
    if config.promotion == "never":
        return False, f"promotion is never; against the {comparison.against}: {found}"
    if champion and student.digest in champion.withdrawn:
        return False, f"the student was rolled back before; against the {comparison.against}: {found}"
    if comparison.p_worse <= SIGNIFICANCE_LEVEL:
        return False, f"worse than the {comparison.against}: {found}"
    return True, f"not worse than the {comparison.against}: {found}"
