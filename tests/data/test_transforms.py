"""Test that the center crop equals its definition and takes little memory."""

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


def make_waves(height: int, width: int) -> NDArray[np.uint8]:
    """Return smooth pixels that differ from place to place."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [np.sin(down / (3 + channel)) + np.cos(across / (5 + channel)) for channel in range(3)]
    return (np.stack(waves, 2) * 60 + 128).astype(np.uint8)


def crop_by_definition(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize the short side of the whole image and return the center."""
    height, width = image.shape[:2]
    scale = transforms.resize_short_side(PHOTOGRAPHS) / min(height, width)
    resized = transforms._resize(image, round(width * scale), round(height * scale))
    top, left = (resized.shape[0] - 224) // 2, (resized.shape[1] - 224) // 2
    return resized[top : top + 224, left : left + 224]


@pytest.mark.parametrize("shape", [(480, 640), (1000, 333), (224, 224), (90, 1440), (31, 30), (3000, 200)])
def test_the_crop_of_an_ordinary_image_equals_the_definition(shape: tuple[int, int]) -> None:
    assert np.array_equal(center_crop(make_waves(*shape), PHOTOGRAPHS), crop_by_definition(make_waves(*shape)))


@pytest.mark.parametrize("shape", [(60, 1400), (1401, 60), (40, 4001)])
def test_the_crop_of_a_strip_is_its_middle(shape: tuple[int, int]) -> None:
    actual = center_crop(make_waves(*shape), PHOTOGRAPHS).astype(int)
    expected = crop_by_definition(make_waves(*shape)).astype(int)
    # The two may differ by a shift of a fraction of a pixel.
    assert np.abs(actual - expected).mean() < 1


@pytest.mark.parametrize("shape", [(1_000_000, 1), (1, 65_500), (2, 3_000_000)])
def test_a_strip_of_any_length_takes_little_memory(shape: tuple[int, int]) -> None:
    strip = np.full((*shape, 3), 77, np.uint8)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crops = [
        center_crop(strip, PHOTOGRAPHS),
        random_resized_crop(strip, PHOTOGRAPHS, np.full(transforms.CROP_RANDOM_COUNT, 0.5)),
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10
    for crop in crops:
        assert crop.shape == (224, 224, 3)
        assert (crop == 77).all()


def test_other_errors_become_reasons_and_a_lack_of_memory_names_the_image() -> None:
    assert describe_decode_error(DecodeError("not an image"), "a.tar: k") == "not an image"
    assert (
        describe_decode_error(ZeroDivisionError("division by zero"), "a.tar: k")
        == "cannot be decoded: ZeroDivisionError"
    )
    with pytest.raises(SemiscaleError, match=r"^a.tar: k: .*SEMI-E062"):
        describe_decode_error(MemoryError(), "a.tar: k")
