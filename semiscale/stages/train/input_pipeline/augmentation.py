"""Augment an image after the random crop: TrivialAugment and random erasing.

Modern recipes use them.

Like the crop, these are pure functions of the image and a few uniform numbers. The pixels are therefore the same on
every rank and thread, and after every restart. Pillow works on bytes in one thread. The reductions of torch would
depend on the number of threads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from semiscale.data.image_decoding import ImageArray
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import random_box

# Equally spaced strengths from the weakest to the strongest.
_STRENGTHS = 31

ImageOp = Callable[[Image.Image, float], Image.Image]


class _Operation(NamedTuple):
    """An operation and the range of its strength.

    Attributes:
        apply: Changes an image by a strength.
        low: The weakest strength.
        high: The strongest strength.
        signed: Whether half of the strengths are negated.
    """

    apply: ImageOp
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


def _affine(
    image: Image.Image, strength: float, translate: tuple[int, int] = (0, 0), shear: tuple[int, int] = (0, 0)
) -> Image.Image:
    """Translate by `strength` pixels, or shear about the upper left corner.

    `translate` and `shear` are 1 in the direction of the operation, x or y, and 0 in the other.
    """
    degrees = math.degrees(math.atan(strength))
    # torchvision has no types.
    return F.affine(  # type: ignore[no-any-return]
        image,
        angle=0.0,
        translate=[int(strength) * direction for direction in translate],
        scale=1.0,
        shear=[degrees * direction for direction in shear],
        interpolation=InterpolationMode.BILINEAR,
        center=[0, 0],
    )


def _centered(adjust: ImageOp) -> ImageOp:
    """Shift the strength of an operation by 1, so that 0 changes nothing."""
    return lambda image, strength: adjust(image, 1 + strength)


# The wide space of Müller and Hutter 2021 (arXiv:2103.10158, table 3), in the form of torchvision's TrivialAugmentWide.
OPERATIONS: dict[str, _Operation] = {
    "identity": _Operation(lambda image, _: image),
    "shear x": _Operation(partial(_affine, shear=(1, 0)), high=0.99, signed=True),
    "shear y": _Operation(partial(_affine, shear=(0, 1)), high=0.99, signed=True),
    "translate x": _Operation(partial(_affine, translate=(1, 0)), high=32, signed=True),
    "translate y": _Operation(partial(_affine, translate=(0, 1)), high=32, signed=True),
    "rotate": _Operation(partial(F.rotate, interpolation=InterpolationMode.BILINEAR), high=135, signed=True),
    "brightness": _Operation(_centered(F.adjust_brightness), high=0.99, signed=True),
    "color": _Operation(_centered(F.adjust_saturation), high=0.99, signed=True),
    "contrast": _Operation(_centered(F.adjust_contrast), high=0.99, signed=True),
    "sharpness": _Operation(_centered(F.adjust_sharpness), high=0.99, signed=True),
    "posterize": _Operation(lambda image, bits: F.posterize(image, round(bits)), low=8, high=2),
    "solarize": _Operation(F.solarize, low=255, high=0),
    "autocontrast": _Operation(lambda image, _: F.autocontrast(image)),
    "equalize": _Operation(lambda image, _: F.equalize(image)),
}


def trivial_augment(image: ImageArray, randoms_R: NDArray[np.float64]) -> ImageArray:
    """Change an image by one operation of one strength (TrivialAugment).

    All operations and strengths are equally likely.

    Pixels from outside of the image are black.

    Args:
        image: image_HWC, RGB, uint8.
        randoms_R: Three uniform numbers: operation, strength, sign.

    Returns:
        image_HWC of the same shape.
    """
    name = list(OPERATIONS)[int(randoms_R[0] * len(OPERATIONS))]
    operation = OPERATIONS[name]
    step = int(randoms_R[1] * _STRENGTHS) / (_STRENGTHS - 1)
    strength = operation.low + (operation.high - operation.low) * step
    if operation.signed and randoms_R[2] < 0.5:
        strength = -strength
    return np.asarray(operation.apply(Image.fromarray(image), strength))


def random_erasing(
    image: ImageArray, probability: float, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]
) -> ImageArray:
    """Fill a random box with the mean colour.

    This is random erasing (Zhong et al. 2017, arXiv:1708.04896).

    The box has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3, as in torchvision. Normalization maps the mean
    colour to 0, up to the rounding of a pixel.

    Args:
        image: image_HWC, RGB, uint8.
        probability: Probability that the image is changed.
        preprocessing: The input of the model, with the mean colour.
        randoms_R: 23 uniform numbers: one for the probability, and 22 for `random_box`.

    Returns:
        image_HWC of the same shape.
    """
    if randoms_R[0] >= probability:
        return image
    height, width = image.shape[:2]
    box = random_box(width, height, randoms_R[1:], areas=(0.02, 0.33), shapes=(0.3, 3.3))
    if box is None:
        return image
    left, top, box_width, box_height = box
    erased = image.copy()
    erased[top : top + box_height, left : left + box_width] = np.round(255 * np.array(preprocessing.mean))
    return erased


class Augment(NamedTuple):
    """The augmentation of a recipe after the random crop.

    Attributes:
        preprocessing: The input of the model.
        erasing: Probability of random erasing.
        randoms: Number of uniform numbers for an image: 3 for `trivial_augment` and 23 for `random_erasing`.
    """

    preprocessing: Preprocessing
    erasing: float
    randoms: int = 26

    def __call__(self, image: ImageArray, randoms_R: NDArray[np.float64]) -> ImageArray:
        """Change one image.

        Args:
            image: image_HWC, RGB, uint8.
            randoms_R: As many uniform numbers as `randoms`.

        Returns:
            image_HWC of the same shape.
        """
        return random_erasing(trivial_augment(image, randoms_R), self.erasing, self.preprocessing, randoms_R[3:])
