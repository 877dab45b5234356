"""Training data in a fixed order, and what a training leaves behind."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from components.shared import shards as sharding
from components.shared.errors import Refused, SemiscaleError
from components.shared.preprocess import fixed_cut, random_crop
from components.shared.receipts import Preprocessing
from components.shared.shards import Columns
from components.shared.splits import LabeledShard
from components.train import data as training_data
from components.train.data import TrainingData
from tests import pictures
from tests.stages import Stages

TINY = Preprocessing(resolution=8, augmentation="shift")


def labeled(folder: Path) -> list[LabeledShard]:
    """Five shards of 10 images, each with its place in the whole set as its label."""
    shards = sharding.find([str(pictures.write_pool(folder / "pool", 5, 10))])
    return [
        LabeledShard(shard, {index: number * 10 + index for index in range(10)}) for number, shard in enumerate(shards)
    ]


def order(data: TrainingData, batch_size: int, steps: int) -> list[int]:
    """The labels in the order that the model sees them."""
    return [int(label) for _, labels_B in data.batches(batch_size, steps) for label in labels_B]


@pytest.mark.parametrize("window_bytes", [1, 1 << 30])
def test_an_epoch_shows_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int) -> None:
    monkeypatch.setattr(training_data, "WINDOW_BYTES", window_bytes)
    seen = order(TrainingData(labeled(tmp_path), Columns(), TINY, seed=1), 7, 50 * 3 // 7)
    assert Counter(seen[:50]) == Counter(range(50))
    assert Counter(seen[50:100]) == Counter(range(50))
    assert seen[:50] != seen[50:100]


def test_the_seed_decides_order_and_pixels(tmp_path: Path) -> None:
    shards = labeled(tmp_path)
    first, again, other = (TrainingData(shards, Columns(), TINY, seed) for seed in (1, 1, 2))
    batches = [[images_BHWC for images_BHWC, _ in data.batches(16, 5)] for data in (first, again)]
    assert all(np.array_equal(one, two) for one, two in zip(*batches, strict=True))
    assert order(first, 16, 5) == order(again, 16, 5) != order(other, 16, 5)


def test_a_photograph_is_cut_to_size() -> None:
    image = np.arange(300 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 200, 3)
    settings = Preprocessing(resolution=64, augmentation="crop-flip")
    assert fixed_cut(image, settings).shape == (64, 64, 3)
    for seed in range(20):
        cut = random_crop(image, settings, np.random.default_rng(seed).random(23))
        assert cut.shape == (64, 64, 3)


def test_a_tiny_image_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(fixed_cut(image, TINY), image)


def test_training_learns_and_is_found_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    receipt = stages.teacher
    assert receipt.validation_top1 > 0.9
    assert receipt.curve[-1].images_processed == receipt.images_processed == 480
    assert stages.train("teacher") == receipt
    assert "finished before" in capfd.readouterr().out


def test_equal_trainings_leave_equal_bytes(tmp_path: Path) -> None:
    first, second = Stages(tmp_path / "a"), Stages(tmp_path / "b")
    assert Path(first.teacher.checkpoint).read_bytes() == Path(second.teacher.checkpoint).read_bytes()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SemiscaleError, match=r"the loss is nan after .* images; lower the rate"):
        Stages(tmp_path).train("teacher", learning_rate=1e30)


@pytest.mark.parametrize(("recipe", "needs"), [("pretrain", "--packed"), ("finetune", "--start")])
def test_a_recipe_names_the_receipt_it_needs(tmp_path: Path, recipe: str, needs: str) -> None:
    with pytest.raises(Refused, match=f"recipe {recipe} needs {needs}"):
        Stages(tmp_path).train(recipe)
