"""What the modern recipe does to an image, against values worked out by hand, and who computes it."""

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
from tests.stages.train.test_train import labeled

SETTINGS = Preprocessing(resolution=64, augmentation="crop-flip")
IMAGE: ImageArray = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
GRADIENT: ImageArray = np.broadcast_to(
    np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)
).copy()  # pixel = column


def changed(image: ImageArray, name: str, strength: float = 1.0, sign: float = 0.5) -> ImageArray:
    """One named operation; strength from 0 to 1, the sign's number below 0.5 for minus."""
    place = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    return trivial_augment(image, np.array([place, min(strength, 1 - 1e-9), sign]))


def gray(*levels: int) -> ImageArray:
    """One row of gray pixels."""
    return np.repeat(np.array(levels, np.uint8)[None, :, None], 3, axis=2)


def test_translation_by_the_strongest_32_pixels() -> None:
    right, left = changed(GRADIENT, "translate x"), changed(GRADIENT, "translate x", sign=0.0)
    assert not right[:, :32].any()
    assert np.array_equal(right[:, 32:], GRADIENT[:, :32])
    assert np.array_equal(left[:, :32], GRADIENT[:, 32:])
    assert not left[:, 32:].any()
    down = changed(IMAGE, "translate y", strength=15.5 / 31)  # the 15th of 30 steps
    assert np.array_equal(down[16:], IMAGE[:48])
    assert not down[:16].any()


@pytest.mark.parametrize(
    ("name", "strength", "sign", "before", "after"),
    [
        ("identity", 1.0, 0.5, (0, 100, 200), (0, 100, 200)),
        ("brightness", 1.0, 0.0, (0, 100, 200), (0, 1, 2)),  # times 1 - 0.99
        ("brightness", 1.0, 0.5, (0, 100, 200), (0, 199, 255)),  # times 1.99
        ("contrast", 1.0, 0.0, (0, 100, 200), (99, 100, 101)),  # 0.01 of the difference to the mean, 100
        ("posterize", 1.0, 0.5, (63, 64, 200, 255), (0, 64, 192, 192)),  # two bits
        ("solarize", 1.0, 0.5, (0, 100, 255), (255, 155, 0)),  # all is above 0
        ("solarize", 0.0, 0.5, (0, 100, 254), (0, 100, 254)),  # nothing is above 255
        ("autocontrast", 0.0, 0.5, (50, 100, 150), (0, 127, 255)),
        ("color", 1.0, 0.0, (0, 100, 200), (0, 100, 200)),  # gray has no colour to lose
    ],
)
def test_colours(name: str, strength: float, sign: float, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    found = changed(gray(*before), name, strength, sign)
    assert np.abs(found.astype(int) - gray(*after)).max() <= 1


def test_equalizing_fills_the_range() -> None:
    found = changed(np.repeat(gray(10, 11, 12, 13), 256, axis=0), "equalize")
    assert (found.min(), found.max()) == (0, 255)


def test_a_rotation_leaves_the_middle_and_a_shear_the_corner() -> None:
    spot = np.zeros((65, 65, 3), np.uint8)
    spot[32, 32] = 255
    assert changed(spot, "rotate")[32, 32].min() > 200
    sheared = changed(GRADIENT, "shear x", strength=0.0)
    assert np.array_equal(sheared, GRADIENT)
    sheared = changed(GRADIENT, "shear x").astype(int)
    # By 0.99 pixels a row, from the upper left corner.
    assert abs(sheared[0, 40, 0] - 40) <= 1
    assert abs(abs(sheared[20, 40, 0] - 40) - 20) <= 1


def test_the_operations_are_torchvisions() -> None:
    """Names, numbers of steps and ranges, of the very table that its recipe uses."""
    space = TrivialAugmentWide()._augmentation_space(31)
    assert len(space) == len(OPERATIONS)
    for (strengths, signed), operation in zip(space.values(), OPERATIONS.values(), strict=True):
        ends = (strengths[0].item(), strengths[-1].item()) if strengths.ndim else (0.0, 0.0)
        assert (operation.low, operation.high, operation.signed) == pytest.approx((*ends, signed))


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_one_operation_gives_torchvisions_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operation, step and sign, drawn in torchvision's own class, which computes strengths in fp32."""
    place = list(OPERATIONS).index(name)
    drawn = iter([place, 20, 1])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(drawn)]))
    theirs = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)(Image.fromarray(IMAGE))
    ours = changed(IMAGE, name, strength=20.5 / 31, sign=0.0)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_a_hole_of_the_mean_colour() -> None:
    # Of 64 x 64 pixels: area 0.02 + 0.31 x 0.5 = 17.5 %, shape 1: a square of 26.77, 27 pixels; 0.5 of 38 places.
    square = (0 - np.log(0.3)) / (np.log(3.3) - np.log(0.3))
    randoms_R = np.array([0.05, *([0.5, square] * 10), 0.5, 0.25])
    found = random_erasing(IMAGE, 0.1, SETTINGS, randoms_R)
    expected = IMAGE.copy()
    expected[9:36, 19:46] = (124, 116, 104)  # 255 x (0.485, 0.456, 0.406)
    assert np.array_equal(found, expected)
    assert np.array_equal(random_erasing(IMAGE, 0.05, SETTINGS, randoms_R), IMAGE)


def test_no_box_is_found_where_none_fits() -> None:
    tall = np.array([1.0, 0.0] * 10 + [0.0, 0.0])  # 33 % at a shape of 0.1: taller than the image
    assert random_box(64, 64, tall, (0.02, 0.33), (0.1, 3.3)) is None


def test_augmented_batches_do_not_depend_on_ranks_or_restarts(tmp_path: Path) -> None:
    settings = Preprocessing(resolution=8, augmentation="shift")
    shards = labeled(tmp_path)

    def data(ranks: DistributedContext = DistributedContext()) -> TrainDataset:  # noqa: B008 - immutable
        return TrainDataset(shards, SampleFields(), settings, 1, ranks, Augment(settings, 0.5))

    plain = TrainDataset(shards, SampleFields(), settings, 1, DistributedContext())
    whole = list(data().batches(10, 6))
    assert not np.array_equal(whole[0].images_BHWC, next(plain.batches(10, 6)).images_BHWC)
    assert np.array_equal(next(data().batches(10, 6, 4)).images_BHWC, whole[4].images_BHWC)
    parts = [list(data(DistributedContext(rank, 3)).batches(10, 6)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].images_BHWC for part in parts]), batch.images_BHWC)
