"""Promote the student to champion if it is not worse on the same test images."""

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

# Level of the one-sided test: the chance that a student as good as the champion is not promoted.
SIGNIFICANCE_LEVEL = 0.05


class PromoteConfig(StageConfig):
    """Student and champion to compare."""

    stage: ClassVar[str] = "promote"
    on_device: ClassVar[bool] = True

    plan: ReceiptUri
    """The plan's receipt, which names the test split and the run."""
    evaluation: ReceiptUri
    """The evaluation's receipt, which names the student."""
    promotion: Promotion = "if-not-worse"
    """if-not-worse, or never, which compares the models only."""
    champion: str = ""
    """Name of the champion. Empty: the name of the run."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""
    force: bool = False
    """Promote the student even if it is worse."""


def promote(config: PromoteConfig) -> PromotionReceipt:
    """Promote the student unless it is worse than the champion.

    Without a champion it is compared with the run's baseline. It is worse if McNemar's exact one-sided test on the same
    test images rejects at SIGNIFICANCE_LEVEL. Of two equally good models the new one is preferred, because it has seen
    newer data. A model that was rolled back is promoted by `force` only. The stage never reuses an earlier result.

    Args:
        config: Inputs of the stage.

    Returns:
        The receipt with the decision and its reason.

    Raises:
        InvalidInputError: A receipt is missing, or the object is not a champion (SEMI-E343).
        SemiscaleError: Other processes changed the champion too often (SEMI-E340).

    Cost:
        Two small files, and a forward pass over the test images if the champion has no predictions for them.
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
    """Compare the student with the champion, or the baseline, on the test images.

    Args:
        config: Inputs of the stage.
        champion: Current champion, or None.
        student: Receipt of the student's training.

    Returns:
        The comparison, or None if both are the same model or have different classes.
    """
    plan, evaluation = load_document(config.plan, PlanReceipt), load_document(config.evaluation, EvaluationReceipt)
    name = "champion" if champion else "baseline"
    other = load_document(
        champion.current.training if champion else evaluation.models["baseline"].training, TrainReceipt
    )
    if other.digest == student.digest or other.classes != student.classes:
        return None
    columns = SampleFields(config.image_column, config.label_column, plan.is_video)
    progress = Progress("promote", 2 * plan.test.samples, unit="predictions")
    evaluator = SplitEvaluator(config.workdir, plan.test, columns, progress)
    return metrics.compare_paired(
        "student", evaluator.predict(student).correct(), name, evaluator.predict(other).correct()
    )


def champion_record(
    plan: PlanReceipt, evaluation: EvaluationReceipt, student: TrainReceipt, why: str
) -> ChampionRecord:
    """Return the record of the student as the champion.

    Args:
        plan: Receipt of the plan.
        evaluation: Receipt of the evaluation.
        student: Receipt of the student's training.
        why: Reason of the promotion.
    """
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
    """Decide whether the student is promoted.

    Args:
        config: Inputs of the stage.
        champion: Current champion, or None.
        student: Receipt of the student's training.
        comparison: Comparison of the student with the champion or the baseline, or None if there is none.

    Returns:
        Whether the student is promoted, and the reason.
    """
    if champion and champion.current.model == student.digest:
        return False, "the student is the champion already"
    if config.force:
        return True, "by force"
    if comparison is None:
        return False, "the champion has other classes; `promote --force` replaces it"
    result = (
        f"{comparison.wins} test images won, {comparison.losses} lost; one-sided p = {comparison.p_worse:.3g}, "
        f"worse at {SIGNIFICANCE_LEVEL:g} or below"
    )
    if config.promotion == "never":
        return False, f"promotion is never; against the {comparison.against}: {result}"
    if champion and student.digest in champion.withdrawn:
        return False, f"the student was rolled back before; against the {comparison.against}: {result}"
    if comparison.p_worse <= SIGNIFICANCE_LEVEL:
        return False, f"worse than the {comparison.against}: {result}"
    return True, f"not worse than the {comparison.against}: {result}"
