"""Test the training data, the step of SGD, and the results of a training."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing
from semiscale.data.image_decoding import decode_image
from semiscale.data.labeled import LabeledShard
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import center_crop, jpeg_scale_denominator, random_resized_crop
from semiscale.models import normalization
from semiscale.stages.train import finite_loss_guard, trainer
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline import dataset as training_data
from semiscale.stages.train.input_pipeline import sample_source
from semiscale.stages.train.input_pipeline.dataset import TrainDataset
from semiscale.stages.train.input_pipeline.device_loader import DeviceBatch
from semiscale.stages.train.train_state import TrainState
from semiscale.stages.train.train_step import TrainStep, split_microbatches
from tests.support import sample_images
from tests.support.stages import Stages

ALONE = DistributedContext()
TINY = Preprocessing(resolution=8, augmentation="shift")


def write_labeled_shards(folder: Path) -> list[LabeledShard]:
    """Write five shards of 10 images. A label is the number of an image in the set."""
    shards = listing.list_shards([str(sample_images.write_pool(folder / "pool", 5, 10))])
    return [
        LabeledShard(shard, np.arange(number * 10, number * 10 + 10, dtype=np.int32))
        for number, shard in enumerate(shards)
    ]


def build_dataset(shards: list[LabeledShard], seed: int = 1, ranks: DistributedContext = ALONE) -> TrainDataset:
    """Return the training data of one rank."""
    return TrainDataset(shards, SampleFields(), TINY, seed, ranks)


def read_order(data: TrainDataset, batch_size: int, steps: int) -> list[int]:
    """Return the labels in the order in which the model sees them."""
    return [int(label) for batch in data.batches(batch_size, steps) for label in batch.labels_B]


@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_an_epoch_shows_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    seen = read_order(build_dataset(write_labeled_shards(tmp_path)), 7, 50 * 3 // 7)
    assert Counter(seen[:50]) == Counter(range(50))
    assert Counter(seen[50:100]) == Counter(range(50))
    assert seen[:50] != seen[50:100]


def test_order_and_pixels_depend_on_the_seed(tmp_path: Path) -> None:
    shards = write_labeled_shards(tmp_path)
    first, again, other = (build_dataset(shards, seed) for seed in (1, 1, 2))
    batches = [[batch.images_BHWC for batch in data.batches(16, 5)] for data in (first, again)]
    assert all(np.array_equal(*pair) for pair in zip(*batches, strict=True))
    assert read_order(first, 16, 5) == read_order(again, 16, 5) != read_order(other, 16, 5)


@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_data_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = write_labeled_shards(tmp_path)
    whole = list(build_dataset(shards).batches(7, 30))
    # 7 x 7 is one image less than an epoch, and 8 x 7 is in the second epoch.
    for done in (1, 7, 8, 20, 29):
        rest = list(build_dataset(shards).batches(7, 30, done))
        assert [batch.keys for batch in rest] == [batch.keys for batch in whole[done:]]
        assert all(np.array_equal(*pair) for pair in zip(rest[0].images_BHWC, whole[done].images_BHWC, strict=True))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_the_ranks_share_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, count: int
) -> None:
    # The slices of the ranks make up the batches of one process. Each sample of an epoch is read by one rank.
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = write_labeled_shards(tmp_path)
    alone = list(build_dataset(shards).batches(10, 10))
    parts = [
        list(build_dataset(shards, ranks=DistributedContext(rank, count)).batches(10, 10)) for rank in range(count)
    ]
    for step, batch in enumerate(alone):
        assert np.array_equal(np.concatenate([part[step].images_BHWC for part in parts]), batch.images_BHWC)
        assert [key for part in parts for key in part[step].keys] == batch.keys
    for epoch in (slice(0, 5), slice(5, 10)):
        labels = [int(label) for part in parts for batch in part[epoch] for label in batch.labels_B]
        assert sorted(labels) == list(range(50))


def test_class_folders_are_mixed_before_the_shuffle_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", 4_000)
    monkeypatch.setattr(sample_source, "FILES_PER_RESHARD", 10)
    monkeypatch.setattr(listing, "FILES_PER_SHARD", 10)
    folders = sample_images.write_folders(tmp_path / "labeled", 30)
    shards = [
        LabeledShard(
            shard, np.array([sorted(sample_images.CLASSES).index(file.name.split("/")[0]) for file in shard.files])
        )
        for shard in listing.list_shards([str(folders)])
    ]
    assert np.mean([len(set(shard.labels.tolist())) for shard in shards]) < 2
    data = build_dataset(shards)
    seen = [key for batch in data.batches(9, 10) for key in batch.keys]
    assert sorted(seen) == sorted(file.name for shard in shards for file in shard.shard.files)
    assert len(set(read_order(data, 9, 1))) == 3


def test_a_photograph_is_cropped_to_the_resolution() -> None:
    image = np.arange(300 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 200, 3)
    settings = Preprocessing(resolution=64, augmentation="crop-flip")
    assert center_crop(image, settings).shape == (64, 64, 3)
    for seed in range(20):
        crop = random_resized_crop(image, settings, np.random.default_rng(seed).random(23))
        assert crop.shape == (64, 64, 3)


def test_a_large_photograph_is_reduced_while_it_is_decoded() -> None:
    """Compare crops of a smooth picture that is reduced during decoding or after it."""
    y, x = np.mgrid[:900, :1203] / 1203
    image = (255 * np.stack([x, y, (np.sin(9 * x) + 1) / 2], axis=2)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    data = file.getvalue()
    settings = Preprocessing(resolution=64, augmentation="crop-flip")
    reductions = set()
    for seed in range(40):
        randoms_R = np.random.default_rng(seed).random(23)
        scale = jpeg_scale_denominator(900, 1203, settings, randoms_R)
        reductions.add(scale)
        reduced = decode_image(data, lambda height, width, scale=scale: scale)  # type: ignore[misc]
        assert reduced.shape == (-(-900 // scale), -(-1203 // scale), 3)
        crop, expected = (
            random_resized_crop(pixels, settings, randoms_R, (900, 1203)) for pixels in (reduced, decode_image(data))
        )
        # The crops may be shifted by a quarter of a pixel of the reduced image.
        assert np.abs(crop.astype(int) - expected).mean() < 2.5
    assert {4, 8} <= reductions <= {2, 4, 8}
    # A square box of the whole area.
    whole_R = np.array([1.0, 0.5] * 11 + [0.0])
    sides = (40, 127, 128, 255, 256, 5000)
    assert [jpeg_scale_denominator(side, side, settings, whole_R) for side in sides] == [1, 1, 2, 2, 4, 8]


def test_a_tiny_image_of_the_right_size_is_not_changed() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(center_crop(image, TINY), image)


def test_a_training_learns_and_is_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    receipt = stages.teacher
    assert receipt.validation_top1 > 0.9
    assert receipt.curve[-1].images_processed == receipt.images_processed == 480
    assert stages.train("teacher") == receipt
    assert "finished before" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("images", "at_most", "sizes"),
    [(24, 24, [24]), (25, 24, [12, 13]), (48, 24, [24, 24]), (49, 24, [16, 16, 17]), (7, 3, [2, 2, 3]), (1, 24, [1])],
)
def test_microbatches_have_nearly_equal_sizes(images: int, at_most: int, sizes: list[int]) -> None:
    parts = split_microbatches(images, at_most)
    assert [part.stop - part.start for part in parts] == sizes
    assert [index for part in parts for index in range(images)[part]] == list(range(images))


@pytest.mark.parametrize("device_batch_size", [12, 5, 1])
def test_a_step_does_not_depend_on_the_number_of_microbatches(device_batch_size: int) -> None:
    """Compare with SGD by hand on the gradient of the mean loss.

    The network has no batch normalization, so an image does not depend on the others.
    """
    config = TrainConfig(
        workdir="", recipe="teacher", architecture="", plan="", batch_size=12, device_batch_size=device_batch_size,
        weight_decay=0.01, resolution=8, augmentation="shift",
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    pixels_BHWC = torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8)
    batch = DeviceBatch(pixels_BHWC, torch.arange(12) % 5, [])
    loss = F.cross_entropy(
        model(normalization.to_normalized_batch(pixels_BHWC.numpy(), TINY, torch.device("cpu"))), batch.labels_B
    )
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    # w - rate * (gradient + weight_decay * w).
    expected = [
        weight - 0.3 * (gradient + 0.01 * weight)
        for weight, gradient in zip(model.parameters(), gradients, strict=True)
    ]
    train_step = TrainStep(config, TrainState(config, model, 100), 100, 0, torch.device("cpu"), ALONE)
    assert train_step.all_reduce_step(batch, 0.3, 1).item() == pytest.approx(loss.item())
    for weight, expected_weight in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(weight, expected_weight, atol=1e-6)


def test_the_error_of_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr("semiscale.stages.train.train_step.training_loss", raise_out_of_memory)
    line = r"^train: CUDA out of memory. Tried to allocate 2.00 GiB. Lower device_batch_size, which is 24: [^\n]*$"
    with pytest.raises(SemiscaleError, match=line):
        Stages(tmp_path).train("teacher", device_batch_size=24)


def test_a_batch_of_one_image_more_than_a_microbatch_can_be_trained_on(tmp_path: Path) -> None:
    """No microbatch has one image.

    The last layers see 1 x 1 pixels, and batch normalization refuses one image of 1 x 1 pixels.
    """
    receipt = Stages(tmp_path).train("teacher", batch_size=25, device_batch_size=24, images_processed=50, resolution=1)
    assert [point.images_processed for point in receipt.curve] == [25, 50]


def test_a_microbatch_of_one_value_per_channel_is_refused(tmp_path: Path) -> None:
    line = "^device_batch_size: resnet8_small .*SEMI-E145"
    with pytest.raises(InvalidInputError, match=line):
        Stages(tmp_path).train("teacher", batch_size=2, device_batch_size=1, images_processed=2, resolution=1)


def test_the_receipt_counts_the_images_of_whole_batches(tmp_path: Path) -> None:
    receipt = Stages(tmp_path).train("teacher", batch_size=24, images_processed=50)
    assert receipt.images_processed == receipt.curve[-1].images_processed == 72


@pytest.mark.parametrize("steps", [50, 130])
def test_every_training_is_validated_ten_times(tmp_path: Path, steps: int) -> None:
    # The validations are equally spaced, whether or not the curve has a point at every step.
    curve = Stages(tmp_path).train("teacher", images_processed=6 * steps, batch_size=6).curve
    assert len(curve) == min(steps, 100)
    validated = [point.images_processed / 6 for point in curve if point.validation_top1 is not None]
    assert validated == [-(-part * steps // 10) for part in range(1, 11)]


def test_equal_trainings_write_equal_bytes(tmp_path: Path) -> None:
    first, second = Stages(tmp_path / "a"), Stages(tmp_path / "b")
    assert Path(first.teacher.checkpoint).read_bytes() == Path(second.teacher.checkpoint).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CURVE_POINTS", 1)
    # The interval of a GPU, where a check waits for the device.
    monkeypatch.setitem(finite_loss_guard.FINITE_CHECK_INTERVAL, "cpu", 16)
    line = r"the loss is nan after 24 images \(step 2, learning rate [\d.e+]+\).*blue/003.png.*and 2 more.*SEMI-E233"
    with pytest.raises(SemiscaleError, match=line) as error:
        Stages(tmp_path).train("teacher", learning_rate=1e30, images_processed=480)
    report = json.loads(Path(re.findall(r"see (.*?)\)", str(error.value))[0]).read_text())
    assert (report["step"], len(report["keys"])) == (2, 12)


@pytest.mark.parametrize(
    ("recipe", "needs"), [("pretrain", "--packed. .SEMI-E232"), ("finetune", "--start.*SEMI-E240")]
)
def test_a_recipe_names_the_receipt_it_needs(tmp_path: Path, recipe: str, needs: str) -> None:
    with pytest.raises(InvalidInputError, match=f"recipe {recipe} needs .*{needs}"):
        Stages(tmp_path).train(recipe)


def test_a_model_of_the_same_classes_in_another_order_is_refused(tmp_path: Path) -> None:
    """Reverse the list of classes between two trainings, which changes their numbers."""
    stages = Stages(tmp_path)
    teacher = stages.train("teacher", images_processed=12)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(reversed(sample_images.CLASSES)))
    again = Stages.on(stages.config, tmp_path)
    assert again.train("teacher", images_processed=12).digest != teacher.digest, "another training"
    line = "'red' for 'blue'.*SEMI-E244"
    with pytest.raises(InvalidInputError, match=line):
        again.train("finetune", images_processed=12, start=stages.uri(teacher))
