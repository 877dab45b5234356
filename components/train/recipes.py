"""How long to train and at which learning rate: the paper's recipes as pure functions of images processed."""

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["teacher", "baseline", "pretrain", "finetune"]

REFERENCE_BATCH = 256  # learning rates are stated for this minibatch and scaled linearly (Goyal et al., section 4.1)


@dataclass(frozen=True)
class Recipe:
    """A learning-rate schedule in equal parts: `drops` reductions by `factor`, after an optional warm-up.

    `warmup_fraction` is the share of all images processed over which the rate climbs to its peak.
    """

    drops: int
    factor: float
    warmup_fraction: float


RECIPES: dict[RecipeName, Recipe] = {
    # Section 4.1: 13 reductions by 2 at equal steps. The warm-up is Goyal et al.'s five epochs of ImageNet, 6.4 million
    # of a billion images; at a thousand times fewer images it is still a handful of steps.
    "pretrain": Recipe(drops=13, factor=0.5, warmup_fraction=0.0064),
    # Section 4.1: three reductions by 0.1 at equal steps, over 30 epochs, no warm-up stated.
    "finetune": Recipe(drops=3, factor=0.1, warmup_fraction=0.0),
    # Section 4.3 calls three drops by 0.1 the common choice; five of 90 epochs of warm-up are Goyal et al.'s.
    "teacher": Recipe(drops=3, factor=0.1, warmup_fraction=5 / 90),
    "baseline": Recipe(drops=3, factor=0.1, warmup_fraction=5 / 90),
}


def learning_rate(recipe: Recipe, base: float, batch_size: int, images: int, total: int) -> float:
    """Return the rate of the step that begins after `images` of `total` images have been processed.

    The peak is base / 256 * batch_size. The warm-up climbs to it from `base` itself (section 4.1: "from 0.1 to
    0.1/256 x 1536"), or stays at the peak where a small minibatch puts that below `base`.
    """
    peak = base * batch_size / REFERENCE_BATCH
    warmup = recipe.warmup_fraction * total
    if images < warmup:
        start = min(base, peak)
        return start + (peak - start) * images / warmup
    part = min(int(images * (recipe.drops + 1) // total), recipe.drops)
    return float(peak * recipe.factor**part)
