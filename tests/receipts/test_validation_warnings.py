"""Test the warnings about a small validation set and a teacher at chance."""

from pathlib import Path

import pytest

from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.validation_warnings import small_validation_warning, validation_warnings, weak_teacher_warning
from tests.support.reports import make_plan_receipt, make_train_receipt


def plan_with_validation(*class_counts: int) -> PlanReceipt:
    """Return a plan whose validation set has these numbers of images by class."""
    plan = make_plan_receipt(Path("here"))
    update = {"samples": sum(class_counts), "class_counts": list(class_counts)}
    return plan.model_copy(update={"validation": plan.validation.model_copy(update=update)})


@pytest.mark.parametrize(("counts", "is_small"), [((10, 10, 10, 10), False), ((10, 10, 10, 9), True), ((0,) * 4, True)])
def test_a_validation_set_below_ten_images_a_class_is_small(counts: tuple[int, ...], is_small: bool) -> None:
    assert bool(small_validation_warning(plan_with_validation(*counts))) == is_small


@pytest.mark.parametrize(("top1", "is_weak"), [(0.0, True), (0.4, True), (0.41, False)])
def test_chance_is_the_share_of_the_most_frequent_class(top1: float, is_weak: bool) -> None:
    teacher = make_train_receipt("teacher", 0.1, 1, 100, top1)
    assert bool(weak_teacher_warning(plan_with_validation(40, 20, 20, 20), teacher)) == is_weak


def test_a_plan_and_a_teacher_can_have_both_warnings() -> None:
    teacher = make_train_receipt("teacher", 0.1, 1, 100, 0.0)
    assert len(validation_warnings(plan_with_validation(1, 1, 1, 1), teacher)) == 2
    assert validation_warnings(make_plan_receipt(Path("here")), make_train_receipt("teacher", 0.1, 1, 100, 0.9)) == []
