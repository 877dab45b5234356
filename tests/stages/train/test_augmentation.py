"""Test the augmentation of the modern recipe.

It is compared with torchvision and with values computed by hand. It must not depend on ranks or restarts.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from semiscale.data.image_decoding import ImageArray
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import random_box
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.augmentation import OPERATIONS, Augment, random_erasing, trivial_augment
from semiscale.stages.train.input_pipeline.dataset import TrainDataset
from tests.stages.train.test_train import write_labeled_shards

SETTINGS = Preprocessing(resolution=64, augmentation="crop-flip")
IMAGE: ImageArray = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
# Every pixel has the number of its column.
GRADIENT: ImageArray = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()


def apply_operation(image: ImageArray, name: str, strength: float = 1.0, sign: float = 0.5) -> ImageArray:
    """Apply an operation of a strength from 0 to 1. A sign below 0.5 means minus."""
    operation = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    return trivial_augment(image, np.array([operation, min(strength, 1 - 1e-9), sign]))


def gray_row(*levels: int) -> ImageArray:
    """Return one row of gray pixels."""
    return np.repeat(np.array(levels, np.uint8)[None, :, None], 3, axis=2)


def test_the_strongest_translation_is_32_pixels() -> None:
    right, left = apply_operation(GRADIENT, "translate x"), apply_operation(GRADIENT, "translate x", sign=0.0)
    assert not right[:, :32].any()
    assert np.array_equal(right[:, 32:], GRADIENT[:, :32])
    assert np.array_equal(left[:, :32], GRADIENT[:, 32:])
    assert not left[:, 32:].any()
    # The 15th of 30 steps.
    down = apply_operation(IMAGE, "translate y", strength=15.5 / 31)
    assert np.array_equal(down[16:], IMAGE[:48])
    assert not down[:16].any()


@pytest.mark.parametrize(
    ("name", "strength", "sign", "before", "after"),
    [
        ("identity", 1.0, 0.5, (0, 100, 200), (0, 100, 200)),
        # Pixels are multiplied by 1 - 0.99.
        ("brightness", 1.0, 0.0, (0, 100, 200), (0, 1, 2)),
        # Pixels are multiplied by 1.99.
        ("brightness", 1.0, 0.5, (0, 100, 200), (0, 199, 255)),
        # 0.01 of the difference to the mean, 100, is left.
        ("contrast", 1.0, 0.0, (0, 100, 200), (99, 100, 101)),
        # Two bits are left.
        ("posterize", 1.0, 0.5, (63, 64, 200, 255), (0, 64, 192, 192)),
        # All pixels are above the threshold 0.
        ("solarize", 1.0, 0.5, (0, 100, 255), (255, 155, 0)),
        # No pixel is above the threshold 255.
        ("solarize", 0.0, 0.5, (0, 100, 254), (0, 100, 254)),
        ("autocontrast", 0.0, 0.5, (50, 100, 150), (0, 127, 255)),
        # Gray has no colour to lose.
        ("color", 1.0, 0.0, (0, 100, 200), (0, 100, 200)),
    ],
)
def test_an_operation_changes_gray_levels(
    name: str, strength: float, sign: float, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    changed = apply_operation(gray_row(*before), name, strength, sign)
    assert np.abs(changed.astype(int) - gray_row(*after)).max() <= 1


def test_equalize_uses_the_whole_range_of_pixels() -> None:
    changed = apply_operation(np.repeat(gray_row(10, 11, 12, 13), 256, axis=0), "equalize")
    assert (changed.min(), changed.max()) == (0, 255)


def test_a_rotation_fixes_the_center_and_a_shear_the_upper_left_corner() -> None:
    spot = np.zeros((65, 65, 3), np.uint8)
    spot[32, 32] = 255
    assert apply_operation(spot, "rotate")[32, 32].min() > 200
    sheared = apply_operation(GRADIENT, "shear x", strength=0.0)
    assert np.array_equal(sheared, GRADIENT)
    sheared = apply_operation(GRADIENT, "shear x").astype(int)
    # Each row is moved by 0.99 pixels more than the one above it.
    assert abs(sheared[0, 40, 0] - 40) <= 1
    assert abs(abs(sheared[20, 40, 0] - 40) - 20) <= 1


def test_operations_have_the_ranges_of_torchvision() -> None:
    space = TrivialAugmentWide()._augmentation_space(31)
    assert len(space) == len(OPERATIONS)
    for (strengths, signed), operation in zip(space.values(), OPERATIONS.values(), strict=True):
        ends = (strengths[0].item(), strengths[-1].item()) if strengths.ndim else (0.0, 0.0)
        assert (operation.low, operation.high, operation.signed) == pytest.approx((*ends, signed))


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_changes_pixels_as_torchvision_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision draws operation, step and sign. It computes strengths in fp32.
    drawn = iter([list(OPERATIONS).index(name), 20, 1])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(drawn)]))
    theirs = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)(Image.fromarray(IMAGE))
    ours = apply_operation(IMAGE, name, strength=20.5 / 31, sign=0.0)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_random_erasing_fills_a_box_with_the_mean_colour() -> None:
    # The area is 0.02 + 0.31 x 0.5 = 17.5 % of 64 x 64 pixels, and the shape is 1. This is a square of 26.77 pixels,
    # rounded to 27. Its row is 0.25 and its column 0.5 of 38 positions.
    square = (0 - np.log(0.3)) / (np.log(3.3) - np.log(0.3))
    randoms_R = np.array([0.05, *([0.5, square] * 10), 0.5, 0.25])
    erased = random_erasing(IMAGE, 0.1, SETTINGS, randoms_R)
    expected = IMAGE.copy()
    # 255 x (0.485, 0.456, 0.406).
    expected[9:36, 19:46] = (124, 116, 104)
    assert np.array_equal(erased, expected)
    assert np.array_equal(random_erasing(IMAGE, 0.05, SETTINGS, randoms_R), IMAGE)


def test_there_is_no_random_box_if_none_fits() -> None:
    # A box of 33 % of the area at a shape of 0.1 is taller than the image.
    tall = np.array([1.0, 0.0] * 10 + [0.0, 0.0])
    assert random_box(64, 64, tall, (0.02, 0.33), (0.1, 3.3)) is None


def test_augmented_batches_do_not_depend_on_ranks_or_restarts(tmp_path: Path) -> None:
    settings = Preprocessing(resolution=8, augmentation="shift")
    shards = write_labeled_shards(tmp_path)

    # The default is immutable.
    def build_dataset(ranks: DistributedContext = DistributedContext()) -> TrainDataset:  # noqa: B008
        return TrainDataset(shards, SampleFields(), settings, 1, ranks, Augment(settings, 0.5))

    plain = TrainDataset(shards, SampleFields(), settings, 1, DistributedContext())
    whole = list(build_dataset().batches(10, 6))
    assert not np.array_equal(whole[0].images_BHWC, next(plain.batches(10, 6)).images_BHWC)
    assert np.array_equal(next(build_dataset().batches(10, 6, 4)).images_BHWC, whole[4].images_BHWC)
    parts = [list(build_dataset(DistributedContext(rank, 3)).batches(10, 6)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].images_BHWC for part in parts]), batch.images_BHWC)
