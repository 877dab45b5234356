"""The fixed cut: what it was for every ordinary image, and within memory for a strip of any length."""

import resource

import numpy as np
import pytest
from numpy.typing import NDArray

from semiscale.common.errors import SemiscaleError
from semiscale.data import transforms
from semiscale.data.image_decoding import DecodeError, describe_decode_error
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import center_crop, random_resized_crop

PHOTOGRAPHS = Preprocessing(resolution=224, augmentation="crop-flip")


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Return smooth pixels of which no two places are alike."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [np.sin(down / (3 + channel)) + np.cos(across / (5 + channel)) for channel in range(3)]
    return (np.stack(waves, 2) * 60 + 128).astype(np.uint8)


def resized_whole(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the cut as its definition says: the short side resized, then the centre."""
    height, width = image.shape[:2]
    scale = transforms.resize_short_side(PHOTOGRAPHS) / min(height, width)
    resized = transforms._resize(image, round(width * scale), round(height * scale))
    top, left = (resized.shape[0] - 224) // 2, (resized.shape[1] - 224) // 2
    return resized[top : top + 224, left : left + 224]


@pytest.mark.parametrize("shape", [(480, 640), (1000, 333), (224, 224), (90, 1440), (31, 30), (3000, 200)])
def test_of_an_ordinary_image_every_bit_is_the_definition(shape: tuple[int, int]) -> None:
    assert np.array_equal(center_crop(picture(*shape), PHOTOGRAPHS), resized_whole(picture(*shape)))


@pytest.mark.parametrize("shape", [(60, 1400), (1401, 60), (40, 4001)])
def test_of_a_strip_the_middle_is_shown(shape: tuple[int, int]) -> None:
    found, whole = (
        cut(picture(*shape)).astype(int) for cut in (lambda one: center_crop(one, PHOTOGRAPHS), resized_whole)
    )
    assert np.abs(found - whole).mean() < 1, "but for a fraction of a pixel"


@pytest.mark.parametrize("shape", [(1_000_000, 1), (1, 65_500), (2, 3_000_000)])
def test_a_strip_of_any_length_takes_little_memory(shape: tuple[int, int]) -> None:
    strip = np.full((*shape, 3), 77, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuts = [
        center_crop(strip, PHOTOGRAPHS),
        random_resized_crop(strip, PHOTOGRAPHS, np.full(transforms.CROP_RANDOM_COUNT, 0.5)),
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "kB"
    for cut in cuts:
        assert cut.shape == (224, 224, 3)
        assert (cut == 77).all()


def test_an_error_that_nobody_thought_of_is_a_reason_and_a_lack_of_memory_names_the_image() -> None:
    assert describe_decode_error(DecodeError("not an image"), "a.tar: k") == "not an image"
    assert (
        describe_decode_error(ZeroDivisionError("division by zero"), "a.tar: k")
        == "cannot be decoded: ZeroDivisionError"
    )
    with pytest.raises(SemiscaleError, match=r"^a.tar: k: .*SEMI-E062"):
        describe_decode_error(MemoryError(), "a.tar: k")
