"""Compute the softmax loss of a batch.

Modern recipes add label smoothing, mixup and CutMix.

All functions are pure. They take tensors and return tensors.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiscale.stages.train.recipes import Recipe


def training_loss(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor, recipe: Recipe, seed: list[int]) -> Tensor:
    """Return the mean softmax loss of a batch (section 3.2).

    The recipe may add label smoothing, mixup and CutMix.

    Args:
        network: Maps images to logits_BC.
        images_BCHW: Normalized images.
        labels_B: Their classes.
        recipe: Label smoothing, and the alphas of mixup and CutMix.
        seed: Determines the mixture, which depends on nothing else.

    Returns:
        The loss, a scalar.
    """
    if not recipe.mixup and not recipe.cutmix:
        return F.cross_entropy(network(images_BCHW), labels_B, label_smoothing=recipe.label_smoothing)
    rng = np.random.default_rng(seed)
    mixed_BCHW, others_B, share = mixup_or_cutmix(images_BCHW, recipe, rng)
    logits_BC = network(mixed_BCHW)
    # The labels are mixed like the images: loss = share * loss(own label) + (1 - share) * loss(label of the other).
    own, other = (
        F.cross_entropy(logits_BC, labels, label_smoothing=recipe.label_smoothing)
        for labels in (labels_B, labels_B[others_B])
    )
    return share * own + (1 - share) * other


def mixup_or_cutmix(images_BCHW: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Mix each image with another image of its batch.

    Mixup (Zhang et al. 2017, arXiv:1710.09412) blends the two. CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a box
    of the other. If the recipe has both, each batch draws one of them, as torchvision's reference does.

    Args:
        images_BCHW: The images.
        recipe: The alphas of mixup and CutMix. At least one is not 0.
        rng: Draws the other images, the method and the share.

    Returns:
        The mixed images_BCHW, the index in the batch of each other image, and the image's own share from 0 to 1.
    """
    others_B = torch.from_numpy(rng.permutation(len(images_BCHW))).to(images_BCHW.device)
    is_cutmix = bool(recipe.cutmix) and (not recipe.mixup or rng.random() < 0.5)
    alpha = recipe.cutmix if is_cutmix else recipe.mixup
    share = float(rng.beta(alpha, alpha))
    if not is_cutmix:
        return share * images_BCHW + (1 - share) * images_BCHW[others_B], others_B, share
    # A box with the area (1 - share) of the image, around a random centre. The part outside of the image is lost.
    height, width = images_BCHW.shape[2:]
    side = (1 - share) ** 0.5
    y, x = rng.random() * height, rng.random() * width
    top, bottom = max(round(y - side * height / 2), 0), min(round(y + side * height / 2), height)
    left, right = max(round(x - side * width / 2), 0), min(round(x + side * width / 2), width)
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[others_B, :, top:bottom, left:right]
    # The labels get the share of the pixels, which is larger than the drawn one if a part of the box is lost.
    return mixed_BCHW, others_B, 1 - (bottom - top) * (right - left) / (height * width)
