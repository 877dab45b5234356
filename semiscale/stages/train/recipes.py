"""How long to train and at which learning rate: the paper's recipes, and one modern one, as presets and pure functions.

Images processed, not epochs, is the unit of every schedule, so that a recipe stays true at any length and for any
number of devices. Learning rates are for 256 images and scaled linearly to the minibatch.

Where the paper contradicts itself, and what is done here:

* Section 4.1: 13 reductions at equally spaced steps. Section 4.3: "13 equally spaced steps", dropping "after every
  step", the last time when nothing is left to train. 13 reductions that count need 14 parts: 14 it is.
* Section 4.1 has three reductions in 30 epochs of fine-tuning: four parts of 7.5 epochs. Table 13 writes 300 epochs as
  [100] x 3: three parts, two reductions that count. Each is taken at its word.
* Table 12 writes [40] x 3 after 40 epochs of warm-up, of 180 in all: 20 are left for the last rate. Likewise 16 +
  3 x 16 of 72 leaves 8, but 16 + 3 x 28 of 100 leaves nothing, so that its third reduction has no effect.
* "Weight decay 0.0001 in all the experiments" (section 4.1), and 0.001 in Table 13.
* Supplement 4.2 claims linear scaling; Table 12 gives clips of 32 frames twice the rate at half the minibatch: the
  same peak. The table is taken at its word.
* Supplement 4.2: for 32 frames each GPU processes 8 clips "due to memory constraints", and for 8 frames "8 images" as
  well; Table 11 has 128 x 16 for 8 frames. The table is taken at its word.
* R(2+1)D-34 with 32 frames, the video teacher, is in Table 11 and not in Table 12: no numbers of its own.
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

REFERENCE_BATCH = 256  # learning rates are stated for this minibatch and scaled linearly (Goyal et al., section 4.1)


class Recipe(BaseModel):
    """A training's numbers. Times are shares of all images processed, so that a recipe may be run at another length.

    `learning_rate` is for 256 images. The rate climbs to its peak over the share `warmup`, from `warmup_from` times the
    peak, or from the rate for 256 images where that is None; then it is multiplied by `factor` at each of `drops_at`,
    or follows half a cosine down to 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learns_from: Literal["labeled", "packed"] = "labeled"
    starts_from_another: bool = False  # a receipt's weights, instead of fresh ones
    learning_rate: float
    batch_size: int
    device_batch_size: int = 24  # section 4.1: what each GPU forwards and normalises at a time
    weight_decay: float = 0.0001  # section 4.1: in all the experiments
    images_processed: int = 0
    epochs: int = 0  # of the labeled set, in addition
    warmup: float = 0.0
    warmup_from: float | None = None
    drops_at: tuple[Fraction, ...] = ()
    factor: float = 0.1
    cosine: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution that the mixture is drawn from
    cutmix: float = 0.0  # likewise; where both are given, every batch draws one of them
    trivial_augment: bool = False  # every image is changed by one random operation after it is cut
    erasing: float = 0.0  # and with this probability has a hole in it
    average: float = 0.0  # share of the training that the averaged weights look back on
    decay_norms: bool = True  # weight decay on the normalisation layers too


def _equal(drops: int) -> tuple[Fraction, ...]:
    return tuple(Fraction(part, drops + 1) for part in range(1, drops + 1))


def _epochs(total: int, *drops_at: int) -> tuple[Fraction, ...]:
    return tuple(Fraction(at, total) for at in drops_at)


_PAPERS_BATCH = 64 * 24  # section 4.1: 64 GPUs, 24 images each
# Section 4.3 calls three drops by 0.1 the common choice, section 4.1 the rate the standard one. Five of 90 epochs of
# warm-up are Goyal et al.'s, and so is the length, 90 epochs of ImageNet's 1.28 million images: the paper has neither.
_SUPERVISED = Recipe(
    learning_rate=0.1, batch_size=_PAPERS_BATCH, images_processed=115_000_000, warmup=5 / 90, drops_at=_equal(3)
)
# Table 11: the minibatches of clips of 8 and of 32 frames, of 128 GPUs.
_CLIPS_OF_8 = {"batch_size": 128 * 16, "device_batch_size": 16}
_CLIPS_OF_32 = {"batch_size": 128 * 8, "device_batch_size": 8}
# Supplement 4.2: 490 million clips, 13 reductions by 2 at equal steps, "with a warm-up" whose length is not stated: the
# images' share. Table 11: 0.064 for every network, 128 GPUs.
_VIDEO_PRETRAIN = Recipe(
    learns_from="packed",
    learning_rate=0.064,
    **_CLIPS_OF_8,
    images_processed=490_000_000,
    warmup=0.0064,
    drops_at=_equal(13),
    factor=0.5,
)
# Table 12, fully-supervised: 180 epochs, 40 of warm-up, [40] x 3.
_VIDEO_SUPERVISED = Recipe(
    learning_rate=0.16, **_CLIPS_OF_8, epochs=180, warmup=40 / 180, drops_at=_epochs(180, 80, 120, 160)
)
# Table 12, all of semi-weakly and two of weakly supervised: 72 epochs, 16 of warm-up, [16] x 3.
_VIDEO_FINETUNE = Recipe(
    starts_from_another=True,
    learning_rate=0.00048,
    **_CLIPS_OF_8,
    epochs=72,
    warmup=16 / 72,
    drops_at=_epochs(72, 32, 48, 64),
)

RECIPES: dict[RecipeName, Recipe] = {
    "teacher": _SUPERVISED,
    "baseline": _SUPERVISED,
    # Section 4.1: 0.1, 1536 images, a billion processed, 13 reductions by 2 at equal steps. The warm-up is Goyal et
    # al.'s five epochs of ImageNet, 6.4 million of a billion; at a thousand times fewer it is still a handful of steps.
    "pretrain": Recipe(
        learns_from="packed",
        learning_rate=0.1,
        batch_size=_PAPERS_BATCH,
        images_processed=1_000_000_000,
        warmup=0.0064,
        drops_at=_equal(13),
        factor=0.5,
    ),
    # Section 4.1: 0.00025/256 x 1536, three reductions by 0.1 at equal steps, over 30 epochs, no warm-up stated.
    "finetune": Recipe(
        starts_from_another=True, learning_rate=0.00025, batch_size=_PAPERS_BATCH, epochs=30, drops_at=_equal(3)
    ),
    # Not the paper's: a control that has what supervised training has learnt since. torchvision's recipe for its
    # IMAGENET1K_V2 weights, ResNet-50 at 80.9 % (Vryniotis 2021, pytorch.org/blog, "How to Train State-Of-The-Art
    # Models Using TorchVision's Latest Primitives"; references/classification): rate 0.5 for 8 x 128 images, 5 of 600
    # epochs of warm-up from 1 %, cosine, weight decay 0.00002 and none of normalisation, label smoothing 0.1, mixup 0.2
    # or CutMix 1.0, TrivialAugment, random erasing 0.1, averaged weights. Its average (0.99998 a step of 32, adjusted
    # by 1024 x 32 / 600) looks back on 600 / 0.00002 = 30 million of 769 million images. Left out: repeated
    # augmentation, and other sizes for training and testing.
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
    # Table 13, CUB2011: 0.0025/256 x 768 (32 GPUs), 300 epochs, [100] x 3, weight decay 0.001.
    "transfer": Recipe(
        starts_from_another=True,
        learning_rate=0.0025,
        batch_size=32 * 24,
        weight_decay=0.001,
        epochs=300,
        drops_at=_epochs(300, 100, 200),
    ),
    "video-pretrain-8": _VIDEO_PRETRAIN,
    "video-pretrain-32": _VIDEO_PRETRAIN.model_copy(update=_CLIPS_OF_32),
    "video-supervised-8": _VIDEO_SUPERVISED,
    "video-supervised-32": _VIDEO_SUPERVISED.model_copy(update={"learning_rate": 0.32, **_CLIPS_OF_32}),
    "video-finetune-8": _VIDEO_FINETUNE,
    "video-finetune-32": _VIDEO_FINETUNE.model_copy(update={"learning_rate": 0.00096, **_CLIPS_OF_32}),
    # Table 12, weakly supervised, 18 layers, 8 frames: 100 epochs, 16 of warm-up, [28] x 3.
    "video-finetune-weak-8": _VIDEO_FINETUNE.model_copy(
        update={"epochs": 100, "warmup": 16 / 100, "drops_at": _epochs(100, 44, 72)}
    ),
}


# What the pipeline's trainings are where the samples are videos: Tables 11 and 12, by the length of the clips.
_OF_CLIPS: dict[RecipeName, tuple[RecipeName, RecipeName]] = {
    "teacher": ("video-supervised-8", "video-supervised-32"),
    "baseline": ("video-supervised-8", "video-supervised-32"),
    "pretrain": ("video-pretrain-8", "video-pretrain-32"),
    "finetune": ("video-finetune-8", "video-finetune-32"),
}


def get_recipe(name: RecipeName, frames: int) -> Recipe:
    """Return a recipe for images, or, where there are frames, for clips: the numbers of 8 frames, above 16 of 32."""
    if frames and name in _OF_CLIPS:
        return RECIPES[_OF_CLIPS[name][frames > 16]]
    return RECIPES[name]


def learning_rate_at(recipe: Recipe, base: float, batch_size: int, images: int, total: int) -> float:
    """Return the rate of the step that begins after `images` of `total` images have been processed.

    The peak is base / 256 * batch_size. The warm-up climbs to it from `base` itself (section 4.1: "from 0.1 to
    0.1/256 x 1536"), or stays at the peak where a small minibatch puts that below `base`.
    """
    peak = base * batch_size / REFERENCE_BATCH
    warmup = recipe.warmup * total
    if images < warmup:
        start = min(base, peak) if recipe.warmup_from is None else recipe.warmup_from * peak
        return start + (peak - start) * images / warmup
    if recipe.cosine:
        return peak * (1 + math.cos(math.pi * (images - warmup) / (total - warmup))) / 2
    return float(peak * recipe.factor ** sum(images >= at * total for at in recipe.drops_at))
