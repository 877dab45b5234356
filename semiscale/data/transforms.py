"""Resize and crop pixels to the input of a model.

Evaluation uses a fixed crop and training a random one. A random crop is a pure function of the image and a few uniform
numbers, so the process that computes it has no influence on the result.
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

# Uniform numbers that one random crop may use: an area and an aspect ratio for each of ten tries, two for the position,
# and one for the mirror.
CROP_RANDOM_COUNT = 23
_TRIES = 10
# The ratio of the resized short side to the centre crop (He et al. 2016).
_RESIZE_RATIO = 256 / 224
# The largest ratio of long to short side of an image that is resized as a whole. Resizing a strip of 1 x 1,000,000
# pixels would take gigabytes.
MAX_ASPECT_RATIO = 16


def center_crop(image: ImageArray, preprocessing: Preprocessing) -> ImageArray:
    """Resize the short side and crop the centre.

    The short side becomes 256/224 of the resolution, or the resolution itself for tiny images.

    Args:
        image: image_HWC, RGB, uint8, of any size.
        preprocessing: The input of the model.

    Returns:
        image_HWC, uint8, of resolution x resolution pixels.

    Cost:
        Memory for at most MAX_ASPECT_RATIO squares of the short side, whatever the aspect ratio of the image.
    """
    image = _crop_extreme_aspect(image)
    size = preprocessing.resolution
    height, width = resize_shape(image.shape[0], image.shape[1], preprocessing)
    resized = _resize(image, width, height)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def resize_shape(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width that an image is resized to before its centre is cropped.

    Args:
        height: The height of the image, in pixels.
        width: The width of the image, in pixels.
        preprocessing: The input of the model.

    Returns:
        Height and width in pixels, neither below the resolution.
    """
    scale = resize_short_side(preprocessing) / min(height, width)
    return max(round(height * scale), preprocessing.resolution), max(round(width * scale), preprocessing.resolution)


def _crop_extreme_aspect(image: ImageArray) -> ImageArray:
    """Remove both ends of an image whose aspect ratio is above MAX_ASPECT_RATIO.

    The centre crop does not contain the ends, but resizing them would take gigabytes.
    """
    height, width = image.shape[:2]
    longest = MAX_ASPECT_RATIO * min(height, width)
    top, left = (max(side - longest, 0) // 2 for side in (height, width))
    return image[top : height - top, left : width - left]


def resize_short_side(preprocessing: Preprocessing) -> int:
    """Return the short side before the centre crop, in pixels."""
    if preprocessing.frames:
        return video_decoding.frame_short_side(preprocessing)
    is_photograph = preprocessing.augmentation == "crop-flip"
    return round(preprocessing.resolution * _RESIZE_RATIO) if is_photograph else preprocessing.resolution


def shift_padding(preprocessing: Preprocessing) -> int:
    """Return the largest random shift in pixels: 4 of 32 (He et al. 2016, section 4.2)."""
    return max(preprocessing.resolution // 8, 1)


def pad_for_shift(image: ImageArray, preprocessing: Preprocessing) -> ImageArray:
    """Crop a tiny image and pad it with black for `random_shift`.

    Args:
        image: image_HWC, RGB, uint8.
        preprocessing: The input of the model.

    Returns:
        image_HWC, uint8, with `shift_padding` more pixels on each side than the resolution.
    """
    padding = shift_padding(preprocessing)
    return np.pad(center_crop(image, preprocessing), ((padding, padding), (padding, padding), (0, 0)))


def random_shift(image: ImageArray, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]) -> ImageArray:
    """Crop a padded tiny image at a random position.

    Args:
        image: image_HWC from `pad_for_shift`.
        preprocessing: The input of the model. With `shift-flip`, half of the crops are mirrored.
        randoms_R: Three uniform numbers: row, column, mirror.

    Returns:
        image_HWC, uint8, of resolution x resolution pixels. It is a view of `image`.
    """
    size, positions = preprocessing.resolution, 2 * shift_padding(preprocessing) + 1
    top, left = int(randoms_R[0] * positions), int(randoms_R[1] * positions)
    crop = image[top : top + size, left : left + size]
    is_mirrored = preprocessing.augmentation == "shift-flip" and randoms_R[2] < 0.5
    return crop[:, ::-1] if is_mirrored else crop


def random_resized_crop(
    image: ImageArray,
    preprocessing: Preprocessing,
    randoms_R: NDArray[np.float64],
    full_size: tuple[int, int] | None = None,
) -> ImageArray:
    """Crop a random box, resize it, and mirror half of the crops.

    The box has 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3. This is the augmentation of Szegedy et al.
    2015 (arXiv:1409.4842, section 6), with the ten tries and the fallback of torchvision.

    Args:
        image: image_HWC, RGB, uint8.
        preprocessing: The input of the model.
        randoms_R: CROP_RANDOM_COUNT uniform numbers.
        full_size: The original height and width of an image that was reduced while it was decoded. The box is drawn on
            the original size, so it shows the same part of the picture.

    Returns:
        image_HWC, uint8, of resolution x resolution pixels.
    """
    height, width = full_size or image.shape[:2]
    left, top, w, h = _crop_box(width, height, randoms_R)
    rows, columns = image.shape[0] / height, image.shape[1] / width
    box = image[round(top * rows) : round((top + h) * rows), round(left * columns) : round((left + w) * columns)]
    crop = _resize(box, preprocessing.resolution, preprocessing.resolution)
    return crop[:, ::-1] if randoms_R[2 * _TRIES + 2] < 0.5 else crop


def jpeg_scale_denominator(
    height: int, width: int, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]
) -> int:
    """Return the largest reduction of a JPEG that `random_resized_crop` allows.

    After the reduction, the box of the same random numbers is still at least as large as the model's input.

    Args:
        height: The height of the image, in pixels.
        width: The width of the image, in pixels.
        preprocessing: The input of the model.
        randoms_R: The numbers that `random_resized_crop` will get.

    Returns:
        The divisor of height and width: 1, 2, 4 or 8.
    """
    _, _, w, h = _crop_box(width, height, randoms_R)
    return next((divisor for divisor in (8, 4, 2) if divisor * preprocessing.resolution <= min(w, h)), 1)


def _crop_box(width: int, height: int, randoms_R: NDArray[np.float64]) -> tuple[int, int, int, int]:
    box = random_box(width, height, randoms_R, areas=(0.08, 1.0), shapes=(3 / 4, 4 / 3))
    return box or _largest_center_box(width, height)


def random_box(
    width: int, height: int, randoms_R: NDArray[np.float64], areas: tuple[float, float], shapes: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Draw a box of random area and aspect ratio that lies inside the image.

    Args:
        width: The width of the image, in pixels.
        height: The height of the image, in pixels.
        randoms_R: 22 uniform numbers: two for each of ten tries, and two for the position.
        areas: The smallest and largest fraction of the area.
        shapes: The smallest and largest aspect ratio, width / height. It is drawn uniformly on a logarithmic scale.

    Returns:
        Left, top, width and height in pixels, or None if all ten tries fail.
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


def _largest_center_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest centred box with an aspect ratio of 3/4 to 4/3."""
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _resize(image: ImageArray, width: int, height: int) -> ImageArray:
    """Resize with a triangle filter that is as wide as the reduction.

    This prevents aliasing. The result equals Pillow's BILINEAR to within one level, in half of its time.
    """
    if image.shape[:2] == (height, width):
        return image
    # The layout channels_last takes two thirds of the time and gives the same bits. NumPy transposes the axes, because
    # every torch call releases the GIL and then waits for it among many threads.
    pixels_BCHW = torch.from_numpy(np.ascontiguousarray(image).reshape(1, *image.shape).transpose(0, 3, 1, 2))
    resized = F.interpolate(pixels_BCHW, size=(height, width), mode="bilinear", antialias=True)
    resized_HWC: ImageArray = resized.numpy()[0].transpose(1, 2, 0)
    return resized_HWC
