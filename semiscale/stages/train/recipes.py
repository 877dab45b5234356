"""Recipes: the length, the learning rate and the regularization of each kind of training.

Most recipes are the paper's, and one is modern. Schedules count images processed and not epochs, so a recipe keeps its
shape at any length and on any number of devices. Learning rates are for 256 images and are scaled linearly to the
minibatch.

The paper contradicts itself in some places. The recipes follow these decisions:

* Section 4.1 has 13 reductions at equally spaced steps. Section 4.3 has "13 equally spaced steps" and a drop "after
  every step". Its last drop would come when nothing is left to train. The recipe has 14 equal parts, so that all 13
  reductions have an effect.
* Section 4.1 has three reductions in 30 epochs of fine-tuning, which are four parts of 7.5 epochs. Table 13 writes 300
  epochs as [100] x 3, which are three parts and two reductions. Each recipe follows its own source.
* Table 12 writes [40] x 3 after 40 epochs of warm-up, of 180 in all. The last rate gets the remaining 20 epochs.
  Likewise 16 + 3 x 16 of 72 leaves 8. But 16 + 3 x 28 of 100 leaves nothing, so the third reduction has no effect.
* Section 4.1 has a weight decay of 0.0001 "in all the experiments", and Table 13 has 0.001. Each recipe follows its own
  source.
* Supplement 4.2 claims linear scaling. Table 12 gives clips of 32 frames twice the rate at half the minibatch, which is
  the same peak. The recipes follow the table.
* Supplement 4.2 has 8 clips a GPU for 32 frames "due to memory constraints", and "8 images" for 8 frames as well. Table
  11 has 128 x 16 for 8 frames. The recipes follow the table.
* The video teacher, R(2+1)D-34 with 32 frames, is in Table 11 and not in Table 12. It has no numbers of its own.
"""

import math
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict

RecipeName = Literal[
    "teacher",
    "baseline",
    "pretrain",
    "finetune",
    "modern",
    "transfer",
    "video-pretrain-8",
    "video-pretrain-32",
    "video-supervised-8",
    "video-supervised-32",
    "video-finetune-8",
    "video-finetune-32",
    "video-finetune-weak-8",
]

# Learning rates are given for this minibatch and scaled linearly (Goyal et al., and section 4.1).
REFERENCE_BATCH = 256


class Recipe(BaseModel):
    """The numbers of a training.

    Times are shares of all images processed, so a recipe may run at another length. `learning_rate` is for 256 images.
    The rate climbs to its peak during the share `warmup`. It starts at `warmup_from` times the peak, or at the rate for
    256 images if `warmup_from` is None. After the warm-up it is multiplied by `factor` at each of `drops_at`. If
    `cosine` is set, it follows half a cosine down to 0 instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learns_from: Literal["labeled", "packed"] = "labeled"
    # Whether the training starts from the weights of another model.
    starts_from_another: bool = False
    learning_rate: float
    batch_size: int
    # Section 4.1: images that each GPU forwards and normalizes at a time.
    device_batch_size: int = 24
    # Section 4.1: "in all the experiments".
    weight_decay: float = 0.0001
    images_processed: int = 0
    # Passes over the labeled set, in addition to `images_processed`.
    epochs: int = 0
    warmup: float = 0.0
    warmup_from: float | None = None
    drops_at: tuple[Fraction, ...] = ()
    factor: float = 0.1
    cosine: bool = False
    label_smoothing: float = 0.0
    # Alpha of the Beta distribution of the mixture. If `mixup` and `cutmix` are given, every batch draws one of them.
    mixup: float = 0.0
    cutmix: float = 0.0
    # Whether one random operation changes every image after the crop.
    trivial_augment: bool = False
    # Probability of random erasing.
    erasing: float = 0.0
    # Time constant of the EMA of the weights, as a share of the training. 0 means no EMA.
    average: float = 0.0
    # Whether weight decay applies to normalization layers.
    decay_norms: bool = True


def _equal_drops(drops: int) -> tuple[Fraction, ...]:
    """Return the times of reductions that divide a training into equal parts."""
    return tuple(Fraction(part, drops + 1) for part in range(1, drops + 1))


def _drops_at_epochs(total: int, *drops_at: int) -> tuple[Fraction, ...]:
    """Return the times of reductions that are given in epochs of `total`."""
    return tuple(Fraction(epoch, total) for epoch in drops_at)


# Section 4.1: 64 GPUs with 24 images each.
_PAPER_BATCH = 64 * 24
# Section 4.3 calls three drops by 0.1 the common choice, and section 4.1 calls the rate the standard one. The paper has
# neither a warm-up nor a length. Both are Goyal et al.'s: 5 epochs of warm-up, and 90 epochs of ImageNet's 1.28 million
# images.
_SUPERVISED = Recipe(
    learning_rate=0.1, batch_size=_PAPER_BATCH, images_processed=115_000_000, warmup=5 / 90, drops_at=_equal_drops(3)
)
# Table 11: minibatches of clips of 8 and of 32 frames on 128 GPUs.
_CLIPS_OF_8 = {"batch_size": 128 * 16, "device_batch_size": 16}
_CLIPS_OF_32 = {"batch_size": 128 * 8, "device_batch_size": 8}
# Supplement 4.2: 490 million clips, 13 reductions by 2 at equal steps, "with a warm-up". The paper does not state the
# length of the warm-up, so it is the same share as for images. Table 11: 0.064 for every network, 128 GPUs.
_VIDEO_PRETRAIN = Recipe(
    learns_from="packed",
    learning_rate=0.064,
    **_CLIPS_OF_8,
    images_processed=490_000_000,
    warmup=0.0064,
    drops_at=_equal_drops(13),
    factor=0.5,
)
# Table 12, fully-supervised: 180 epochs, 40 of warm-up, [40] x 3.
_VIDEO_SUPERVISED = Recipe(
    learning_rate=0.16, **_CLIPS_OF_8, epochs=180, warmup=40 / 180, drops_at=_drops_at_epochs(180, 80, 120, 160)
)
# Table 12, all semi-weakly supervised and two weakly supervised models: 72 epochs, 16 of warm-up, [16] x 3.
_VIDEO_FINETUNE = Recipe(
    starts_from_another=True,
    learning_rate=0.00048,
    **_CLIPS_OF_8,
    epochs=72,
    warmup=16 / 72,
    drops_at=_drops_at_epochs(72, 32, 48, 64),
)

RECIPES: dict[RecipeName, Recipe] = {
    "teacher": _SUPERVISED,
    "baseline": _SUPERVISED,
    # Section 4.1: rate 0.1, 1536 images, a billion processed, 13 reductions by 2 at equal steps. The warm-up is that of
    # Goyal et al.: 5 epochs of ImageNet are 6.4 million of a billion images. Even a training that is a thousand times
    # shorter has a few steps of warm-up.
    "pretrain": Recipe(
        learns_from="packed",
        learning_rate=0.1,
        batch_size=_PAPER_BATCH,
        images_processed=1_000_000_000,
        warmup=0.0064,
        drops_at=_equal_drops(13),
        factor=0.5,
    ),
    # Section 4.1: rate 0.00025/256 x 1536, three reductions by 0.1 at equal steps, 30 epochs. No warm-up is stated.
    "finetune": Recipe(
        starts_from_another=True, learning_rate=0.00025, batch_size=_PAPER_BATCH, epochs=30, drops_at=_equal_drops(3)
    ),
    # This recipe is not the paper's. It is a control with the later progress of supervised training. It follows
    # torchvision's recipe for the IMAGENET1K_V2 weights, a ResNet-50 at 80.9 % (Vryniotis 2021, pytorch.org/blog, "How
    # to Train State-Of-The-Art Models Using TorchVision's Latest Primitives", and references/classification). That
    # recipe has rate 0.5 for 8 x 128 images, 5 of 600 epochs of warm-up from 1 %, a cosine, weight decay 0.00002 and
    # none for normalization layers, label smoothing 0.1, mixup 0.2 or CutMix 1.0, TrivialAugment, random erasing 0.1
    # and an EMA of the weights. The EMA has decay 0.99998 a step of 32, adjusted by 1024 x 32 / 600. Its time constant
    # is 600 / 0.00002 = 30 million of 769 million images. Repeated augmentation and different sizes for training and
    # testing are left out.
    "modern": Recipe(
        learning_rate=0.125,
        batch_size=8 * 128,
        device_batch_size=128,
        weight_decay=0.00002,
        epochs=600,
        warmup=5 / 600,
        warmup_from=0.01,
        cosine=True,
        label_smoothing=0.1,
        mixup=0.2,
        cutmix=1.0,
        trivial_augment=True,
        erasing=0.1,
        average=0.039,
        decay_norms=False,
    ),
    # Table 13, CUB2011: rate 0.0025/256 x 768 (32 GPUs), 300 epochs, [100] x 3, weight decay 0.001.
    "transfer": Recipe(
        starts_from_another=True,
        learning_rate=0.0025,
        batch_size=32 * 24,
        weight_decay=0.001,
        epochs=300,
        drops_at=_drops_at_epochs(300, 100, 200),
    ),
    "video-pretrain-8": _VIDEO_PRETRAIN,
    "video-pretrain-32": _VIDEO_PRETRAIN.model_copy(update=_CLIPS_OF_32),
    "video-supervised-8": _VIDEO_SUPERVISED,
    "video-supervised-32": _VIDEO_SUPERVISED.model_copy(update={"learning_rate": 0.32, **_CLIPS_OF_32}),
    "video-finetune-8": _VIDEO_FINETUNE,
    "video-finetune-32": _VIDEO_FINETUNE.model_copy(update={"learning_rate": 0.00096, **_CLIPS_OF_32}),
    # Table 12, weakly supervised, 18 layers, 8 frames: 100 epochs, 16 of warm-up, [28] x 3.
    "video-finetune-weak-8": _VIDEO_FINETUNE.model_copy(
        update={"epochs": 100, "warmup": 16 / 100, "drops_at": _drops_at_epochs(100, 44, 72)}
    ),
}


# Tables 11 and 12: the recipes of the pipeline's trainings on clips of 8 and of 32 frames.
_VIDEO_RECIPES: dict[RecipeName, tuple[RecipeName, RecipeName]] = {
    "teacher": ("video-supervised-8", "video-supervised-32"),
    "baseline": ("video-supervised-8", "video-supervised-32"),
    "pretrain": ("video-pretrain-8", "video-pretrain-32"),
    "finetune": ("video-finetune-8", "video-finetune-32"),
}


def get_recipe(name: RecipeName, frames: int) -> Recipe:
    """Return the recipe of a training on images or clips.

    Args:
        name: Name of the recipe.
        frames: Frames of a clip, or 0 for images. Clips of up to 16 frames take the numbers for 8 frames, and longer
            clips those for 32.

    Returns:
        The recipe.
    """
    if frames and name in _VIDEO_RECIPES:
        return RECIPES[_VIDEO_RECIPES[name][frames > 16]]
    return RECIPES[name]


def learning_rate_at(recipe: Recipe, base: float, batch_size: int, images: int, total: int) -> float:
    """Return the learning rate of the step that begins after `images` images.

    The peak is base / 256 * batch_size. The warm-up climbs to it from `base` (section 4.1: "from 0.1 to 0.1/256 x
    1536"). If a small minibatch makes the peak lower than `base`, the rate stays at the peak.

    Args:
        recipe: The recipe.
        base: Learning rate for 256 images.
        batch_size: Images of the global minibatch.
        images: Images processed before the step.
        total: Images of the whole training.

    Returns:
        The learning rate.
    """
    peak = base * batch_size / REFERENCE_BATCH
    warmup = recipe.warmup * total
    if images < warmup:
        start = min(base, peak) if recipe.warmup_from is None else recipe.warmup_from * peak
        return start + (peak - start) * images / warmup
    if recipe.cosine:
        return peak * (1 + math.cos(math.pi * (images - warmup) / (total - warmup))) / 2
    return float(peak * recipe.factor ** sum(images >= share * total for share in recipe.drops_at))
