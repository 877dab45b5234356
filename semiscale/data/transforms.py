"""Pixels to what a model sees: one size, cut in a fixed way for measuring and in a random one for training.

A random cut is a pure function of the image and a few uniform numbers, so that who computes it does not matter.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semiscale.data import video_decoding
from semiscale.data.image_decoding import ImageArray
from semiscale.data.preprocessing import Preprocessing

Batch = NDArray[np.uint8]  # images_BHWC, RGB

CROP_RANDOM_COUNT = (
    23  # uniform numbers that one random cut may use: ten tries of an area and a shape, a place, a mirror
)
_TRIES = 10
_RESIZE_RATIO = 256 / 224  # the short side before the centre crop (He et al. 2016)
MAX_ASPECT_RATIO = (
    16  # times its short side, of an image that is resized whole: a strip of one pixel by a million is not
)


def center_crop(image: ImageArray, preprocessing: Preprocessing) -> ImageArray:
    """Cut the centre, the short side resized to 256/224 of the resolution, or to the resolution for tiny images.

    Returns uint8 resolution x resolution x 3. Memory: 16 squares of the short side, whatever the image's shape.
    """
    image = _crop_extreme_aspect(image)
    size = preprocessing.resolution
    height, width = resize_shape(image.shape[0], image.shape[1], preprocessing)
    resized = _resize(image, width, height)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def resize_shape(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width that an image is resized to before its centre is cut."""
    scale = resize_short_side(preprocessing) / min(height, width)
    return max(round(height * scale), preprocessing.resolution), max(round(width * scale), preprocessing.resolution)


def _crop_extreme_aspect(image: ImageArray) -> ImageArray:
    """Leave out the ends of an image that is much longer than wide: the centre cut does not show them, but resizing the
    image whole would take gigabytes. Other images stay as they are.
    """
    height, width = image.shape[:2]
    longest = MAX_ASPECT_RATIO * min(height, width)
    top, left = (max(side - longest, 0) // 2 for side in (height, width))
    return image[top : height - top, left : width - left]


def resize_short_side(preprocessing: Preprocessing) -> int:
    """Return what the short side is resized to before the centre is cut, in pixels."""
    if preprocessing.frames:
        return video_decoding.resize_short_side(preprocessing)
    photographs = preprocessing.augmentation == "crop-flip"
    return round(preprocessing.resolution * _RESIZE_RATIO) if photographs else preprocessing.resolution


def shift_padding(preprocessing: Preprocessing) -> int:
    """Return by how many pixels a random shift moves at most: 4 of 32, as He et al. 2016, section 4.2."""
    return max(preprocessing.resolution // 8, 1)


def pad_for_shift(image: ImageArray, preprocessing: Preprocessing) -> ImageArray:
    """Cut a tiny image and surround it with black, ready for `shifted`."""
    around = shift_padding(preprocessing)
    return np.pad(center_crop(image, preprocessing), ((around, around), (around, around), (0, 0)))


def random_shift(image: ImageArray, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]) -> ImageArray:
    """Cut a random place out of a padded tiny image and, for shift-flip, mirror every other one."""
    size, places = preprocessing.resolution, 2 * shift_padding(preprocessing) + 1
    top, left = int(randoms_R[0] * places), int(randoms_R[1] * places)
    cut = image[top : top + size, left : left + size]
    mirror = preprocessing.augmentation == "shift-flip" and randoms_R[2] < 0.5
    return cut[:, ::-1] if mirror else cut


def random_resized_crop(
    image: ImageArray,
    preprocessing: Preprocessing,
    randoms_R: NDArray[np.float64],
    full_size: tuple[int, int] | None = None,
) -> ImageArray:
    """Cut a random 8 to 100 % of the area at a shape of 3/4 to 4/3, resize it, and mirror every other one.

    The augmentation of Szegedy et al. 2015 (arXiv:1409.4842, section 6), with torchvision's ten tries and its fallback.
    Of an image that was reduced while it was decoded, `full_size` is its height and width before: the box is drawn on
    those, so that it is the same part of the picture.
    """
    height, width = full_size or image.shape[:2]
    left, top, w, h = _crop_box(width, height, randoms_R)
    rows, columns = image.shape[0] / height, image.shape[1] / width
    box = image[round(top * rows) : round((top + h) * rows), round(left * columns) : round((left + w) * columns)]
    cut = _resize(box, preprocessing.resolution, preprocessing.resolution)
    return cut[:, ::-1] if randoms_R[2 * _TRIES + 2] < 0.5 else cut


def jpeg_scale_denominator(
    height: int, width: int, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]
) -> int:
    """Return by how much an image may be reduced before `random_crop` cuts it with the same numbers: 1, 2, 4 or 8.

    The box still has the pixels that the model sees.
    """
    _, _, w, h = _crop_box(width, height, randoms_R)
    return next((by for by in (8, 4, 2) if by * preprocessing.resolution <= min(w, h)), 1)


def _crop_box(width: int, height: int, randoms_R: NDArray[np.float64]) -> tuple[int, int, int, int]:
    box = random_box(width, height, randoms_R, areas=(0.08, 1.0), shapes=(3 / 4, 4 / 3))
    return box or _middle(width, height)


def random_box(
    width: int, height: int, randoms_R: NDArray[np.float64], areas: tuple[float, float], shapes: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Draw a box of a random share of the area and of a random shape, width / height, that lies in the image.

    Returns left, top, width, height in pixels, or None where ten tries found none. Takes 22 uniform numbers: two of
    each try, and the place.
    """
    low, high = (math.log(shape) for shape in shapes)
    for attempt in range(_TRIES):
        area = width * height * (areas[0] + (areas[1] - areas[0]) * randoms_R[2 * attempt])
        shape = math.exp(low + (high - low) * randoms_R[2 * attempt + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left = int(randoms_R[2 * _TRIES] * (width - w + 1))
            top = int(randoms_R[2 * _TRIES + 1] * (height - h + 1))
            return left, top, w, h
    return None


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest box in the middle whose shape is 3/4 to 4/3."""
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _resize(image: ImageArray, width: int, height: int) -> ImageArray:
    """Resize with a triangle filter as wide as the reduction, so that nothing aliases: Pillow's BILINEAR to within one
    level, in half of its time.
    """
    if image.shape[:2] == (height, width):
        return image
    # A batch of one that torch knows as channels_last takes two thirds of the time, to the same bits. NumPy turns the
    # axes: each call of torch lets go of the interpreter, and among many threads waits to get it back.
    pixels_BCHW = torch.from_numpy(np.ascontiguousarray(image).reshape(1, *image.shape).transpose(0, 3, 1, 2))
    resized = F.interpolate(pixels_BCHW, size=(height, width), mode="bilinear", antialias=True)
    found: ImageArray = resized.numpy()[0].transpose(1, 2, 0)
    return found
