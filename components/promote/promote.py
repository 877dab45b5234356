"""Promote: the student becomes the champion if it is not worse on the same test images."""

import time
from datetime import UTC, datetime
from typing import ClassVar

from components.promote.champion import Champion, Reign, champion_uri, succeeded, switch
from components.shared import measures, storage
from components.shared.predictions import Exam
from components.shared.progress import Progress, say
from components.shared.receipts import Comparison, EvaluationReceipt, PlanReceipt, PromotionReceipt, TrainReceipt, load
from components.shared.runfile import Promotion
from components.shared.shards import Columns
from components.shared.stage import ReceiptUri, StageConfig

LEVEL = 0.05  # of the one-sided test: a student as good as the champion is turned down so often


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
    plan, evaluation = load(config.plan, PlanReceipt), load(config.evaluation, EvaluationReceipt)
    student = load(evaluation.models["student"].training, TrainReceipt)
    uri = champion_uri(config.workdir, config.champion or plan.name)
    verdicts: list[tuple[bool, str, Comparison | None]] = []

    def change(champion: Champion | None) -> Champion | None:
        comparison = compared(config, champion, student)
        promoted, why = judged(config, champion, student, comparison)
        verdicts.append((promoted, why, comparison))
        return succeeded(champion, reign_of(plan, evaluation, student, why)) if promoted else None

    switch(uri, change)
    promoted, why, comparison = verdicts[-1]
    say("promote", f"{'promoted' if promoted else 'not promoted'}: {why}")
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


def compared(config: PromoteConfig, champion: Champion | None, student: TrainReceipt) -> Comparison | None:
    """Compare the student with the champion on this run's test images; None where the two cannot be compared."""
    plan, evaluation = load(config.plan, PlanReceipt), load(config.evaluation, EvaluationReceipt)
    name = "champion" if champion else "baseline"
    other = load(champion.current.training if champion else evaluation.models["baseline"].training, TrainReceipt)
    if other.digest == student.digest or other.classes != student.classes:
        return None
    columns = Columns(config.image_column, config.label_column, plan.videos)
    exam = Exam(config.workdir, plan.test, columns, Progress("promote", 2 * plan.test.samples))
    return measures.compare("student", exam.predictions(student).right(), name, exam.predictions(other).right())


def reign_of(plan: PlanReceipt, evaluation: EvaluationReceipt, student: TrainReceipt, why: str) -> Reign:
    """Return what the champions' object says of the student from now on."""
    return Reign(
        model=student.digest,
        checkpoint=student.checkpoint,
        training=evaluation.models["student"].training,
        run=plan.name,
        test=plan.test.digest,
        top1=evaluation.models["student"].top1,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        why=why,
    )


def judged(
    config: PromoteConfig, champion: Champion | None, student: TrainReceipt, comparison: Comparison | None
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
    if comparison.p_worse <= LEVEL:
        return False, f"worse than the {comparison.against}: {found}"
    return True, f"not worse than the {comparison.against}: {found}"
