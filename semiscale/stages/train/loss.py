"""What a step minimises: the softmax loss, and what a modern recipe adds to it. Only tensors in, tensors out."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiscale.stages.train.recipes import Recipe


def training_loss(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor, recipe: Recipe, seed: list[int]) -> Tensor:
    """Return the mean softmax loss of a batch (section 3.2), with the recipe's label smoothing, mixup and CutMix.

    The mixture follows from the seed alone, as all of a training's randomness does.
    """
    if not recipe.mixup and not recipe.cutmix:
        return F.cross_entropy(network(images_BCHW), labels_B, label_smoothing=recipe.label_smoothing)
    rng = np.random.default_rng(seed)
    mixed_BCHW, others_B, share = mixup_or_cutmix(images_BCHW, recipe, rng)
    logits_BC = network(mixed_BCHW)
    own, other = (
        F.cross_entropy(logits_BC, labels, label_smoothing=recipe.label_smoothing)
        for labels in (labels_B, labels_B[others_B])
    )
    return share * own + (1 - share) * other


def mixup_or_cutmix(images_BCHW: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Mix each image with another of its batch; returns the images, the others' places, and the image's own share.

    Mixup (Zhang et al. 2017, arXiv:1710.09412) blends the two; CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a box
    of the other. Where the recipe has both, each batch draws one, as torchvision's reference does.
    """
    others_B = torch.from_numpy(rng.permutation(len(images_BCHW))).to(images_BCHW.device)
    pastes = bool(recipe.cutmix) and (not recipe.mixup or rng.random() < 0.5)
    alpha = recipe.cutmix if pastes else recipe.mixup
    share = float(rng.beta(alpha, alpha))
    if not pastes:
        return share * images_BCHW + (1 - share) * images_BCHW[others_B], others_B, share
    height, width = images_BCHW.shape[2:]
    side = (1 - share) ** 0.5
    y, x = rng.random() * height, rng.random() * width
    top, bottom = max(round(y - side * height / 2), 0), min(round(y + side * height / 2), height)
    left, right = max(round(x - side * width / 2), 0), min(round(x + side * width / 2), width)
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[others_B, :, top:bottom, left:right]
    return mixed_BCHW, others_B, 1 - (bottom - top) * (right - left) / (height * width)
