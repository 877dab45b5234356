"""Warn of a validation set or a teacher that cannot carry the decisions that depend on it."""

from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt

MIN_VALIDATION_IMAGES_PER_CLASS = 10


def small_validation_warning(plan: PlanReceipt) -> str:
    """Return a warning if the validation set is small, or "".

    Args:
        plan: The receipt of the plan.
    """
    images, classes = plan.validation.samples, len(plan.classes)
    if images >= MIN_VALIDATION_IMAGES_PER_CLASS * classes:
        return ""
    return (
        f"The validation set has {images:,} images for {classes:,} classes, fewer than "
        f"{MIN_VALIDATION_IMAGES_PER_CLASS} a class. It chooses the learning rates, so the choice is mostly chance. "
        "Give more validation images."
    )


def weak_teacher_warning(plan: PlanReceipt, teacher: TrainReceipt) -> str:
    """Return a warning if the teacher is not better than chance on the validation set, or "".

    Chance is the accuracy of always predicting the most frequent class.

    Args:
        plan: The receipt of the plan.
        teacher: The receipt of the teacher.
    """
    chance = max(plan.validation.class_counts, default=0) / max(plan.validation.samples, 1)
    if teacher.validation_top1 > chance:
        return ""
    return (
        f"The teacher is not better than chance. Its validation top-1 is {teacher.validation_top1:.2%}, and the most "
        f"frequent class alone gives {chance:.2%}. Its scores say nothing about the pool. Give more labels or train it "
        "longer."
    )


def validation_warnings(plan: PlanReceipt, teacher: TrainReceipt) -> list[str]:
    """Return all warnings about the validation set and the teacher.

    Args:
        plan: The receipt of the plan.
        teacher: The receipt of the teacher.
    """
    return [warning for warning in (weak_teacher_warning(plan, teacher), small_validation_warning(plan)) if warning]
