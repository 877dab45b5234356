"""Test the softmax loss, and mixup, CutMix and label smoothing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from semiscale.stages.train import loss
from semiscale.stages.train.recipes import RECIPES, Recipe

# All pixels of image n are n.
IMAGES_BCHW = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
LABELS_B = torch.tensor([0, 1, 2, 3])


def changed_recipe(**changes: float) -> Recipe:
    """Return the paper's supervised recipe with changes."""
    return RECIPES["baseline"].model_copy(update=changes)


def test_the_loss_of_the_paper_is_the_softmax_loss() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    value = loss.training_loss(network, IMAGES_BCHW, LABELS_B, changed_recipe(), [0])
    assert torch.equal(value, F.cross_entropy(network(IMAGES_BCHW), LABELS_B))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_returned_share_is_that_of_the_pixels(kind: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mixed_BCHW, others_B, share = loss.mixup_or_cutmix(IMAGES_BCHW, changed_recipe(**{kind: 1.0}), rng)
        expected = share * LABELS_B + (1 - share) * LABELS_B[others_B]
        assert mixed_BCHW.mean((1, 2, 3)) == pytest.approx(expected, abs=1e-5)
        if kind == "cutmix":
            assert set(mixed_BCHW.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_the_losses_of_mixed_labels_are_weighted_by_the_share() -> None:
    class FixedLogits(nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.arange(16.0).view(4, 4).sin()

    settings = changed_recipe(mixup=0.2, label_smoothing=0.1)
    _, others_B, share = loss.mixup_or_cutmix(IMAGES_BCHW, settings, np.random.default_rng([7, 1]))
    target_BC = share * F.one_hot(LABELS_B, 4) + (1 - share) * F.one_hot(LABELS_B[others_B], 4)
    log_BC = torch.arange(16.0).view(4, 4).sin().log_softmax(1)
    expected = -((0.9 * target_BC + 0.1 / 4) * log_BC).sum(1).mean()
    assert loss.training_loss(FixedLogits(), IMAGES_BCHW, LABELS_B, settings, [7, 1]).item() == pytest.approx(
        expected.item()
    )
