"""Evaluation: the best on validation is measured, on the test images, and counted right."""

from pathlib import Path

import pytest
import torch

from components.evaluate.measure import best
from components.shared.predict import hits
from tests.stages import Stages


def test_hits() -> None:
    logits_BC = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    labels_B = torch.tensor([0, 0, 0])
    assert hits(logits_BC, labels_B, 1).tolist() == [True, False, False]
    assert hits(logits_BC, labels_B, 2).tolist() == [True, False, True]
    assert hits(logits_BC, labels_B, 5).tolist() == [True, True, True]


def test_four_models_on_the_same_images(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    receipt = stages.evaluation
    assert receipt.models.keys() == {"teacher", "baseline", "pretrained", "student"}
    for name, model in receipt.models.items():
        assert model.images == 18
        assert model.top1 <= model.top5 == 1.0
        assert sum(receipt.per_class[name]) / 3 == pytest.approx(model.top1)
    assert receipt.chosen["student"] == best(stages.students).learning_rate


def test_of_equals_the_smallest_learning_rate_is_chosen(tmp_path: Path) -> None:
    one = Stages(tmp_path).teacher
    tried = [one.model_copy(update={"learning_rate": rate, "validation_top1": 0.5}) for rate in (0.3, 0.1, 0.2)]
    assert best(tried).learning_rate == 0.1
    better = one.model_copy(update={"learning_rate": 0.9, "validation_top1": 0.6})
    assert best([*tried, better]).learning_rate == 0.9
