"""What a modern recipe does to an image after it is cut: one random change of colour or shape, and a hole.

Pure functions of the image and a few uniform numbers, as the cut is: whichever rank or thread computes them, after
however many restarts, the pixels are the same. Pillow works on bytes, in one thread; torch's reductions would depend on
the number of threads.
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

_STRENGTHS = 31  # steps from none to the strongest

ImageOp = Callable[[Image.Image, float], Image.Image]


class _Operation(NamedTuple):
    change: ImageOp
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


def _affine(
    image: Image.Image, strength: float, move: tuple[int, int] = (0, 0), shear: tuple[int, int] = (0, 0)
) -> Image.Image:
    """Move by `strength` pixels, or shear by it about the upper left corner, in the directions given."""
    degrees = math.degrees(math.atan(strength))
    return F.affine(  # type: ignore[no-any-return]  # torchvision has no types
        image,
        angle=0.0,
        translate=[int(strength) * way for way in move],
        scale=1.0,
        shear=[degrees * way for way in shear],
        interpolation=InterpolationMode.BILINEAR,
        center=[0, 0],
    )


def _centered(adjust: ImageOp) -> ImageOp:
    """Let 0 be the strength that changes nothing."""
    return lambda image, strength: adjust(image, 1 + strength)


# Müller and Hutter 2021 (arXiv:2103.10158), table 3, the wide space, as torchvision's TrivialAugmentWide has it.
OPERATIONS: dict[str, _Operation] = {
    "identity": _Operation(lambda image, _: image),
    "shear x": _Operation(partial(_affine, shear=(1, 0)), high=0.99, signed=True),
    "shear y": _Operation(partial(_affine, shear=(0, 1)), high=0.99, signed=True),
    "translate x": _Operation(partial(_affine, move=(1, 0)), high=32, signed=True),
    "translate y": _Operation(partial(_affine, move=(0, 1)), high=32, signed=True),
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
    """Change an image by one operation of one strength, all equally likely: TrivialAugment.

    What moves in from outside is black. Takes three uniform numbers: operation, strength, sign.
    """
    name = list(OPERATIONS)[int(randoms_R[0] * len(OPERATIONS))]
    operation = OPERATIONS[name]
    step = int(randoms_R[1] * _STRENGTHS) / (_STRENGTHS - 1)
    strength = operation.low + (operation.high - operation.low) * step
    if operation.signed and randoms_R[2] < 0.5:
        strength = -strength
    return np.asarray(operation.change(Image.fromarray(image), strength))


def random_erasing(
    image: ImageArray, probability: float, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]
) -> ImageArray:
    """Fill a random box with the mean colour, with a probability: random erasing (Zhong et al. 2017, arXiv:1708.04896).

    The box is 2 to 33 % of the area at a shape of 0.3 to 3.3, as torchvision's; the mean colour is what normalisation
    makes 0, to the nearest level. Takes 23 uniform numbers: the chance, and a box's.
    """
    if randoms_R[0] >= probability:
        return image
    height, width = image.shape[:2]
    box = random_box(width, height, randoms_R[1:], areas=(0.02, 0.33), shapes=(0.3, 3.3))
    if box is None:
        return image
    left, top, across, down = box
    holed = image.copy()
    holed[top : top + down, left : left + across] = np.round(255 * np.array(preprocessing.mean))
    return holed


class Augment(NamedTuple):
    """What a recipe adds to the random cut of an image."""

    preprocessing: Preprocessing
    erasing: float
    randoms: int = 26  # uniform numbers that one image may use: three of `trivial`, 23 of `erased`

    def __call__(self, image: ImageArray, randoms_R: NDArray[np.float64]) -> ImageArray:
        """Change one image; takes `randoms` uniform numbers."""
        return random_erasing(trivial_augment(image, randoms_R), self.erasing, self.preprocessing, randoms_R[3:])
