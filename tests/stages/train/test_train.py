"""Training data in a fixed order, and what a training leaves behind."""

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
from tests.support import pictures
from tests.support.stages import Stages

ALONE = DistributedContext()
TINY = Preprocessing(resolution=8, augmentation="shift")


def labeled(folder: Path) -> list[LabeledShard]:
    """Five shards of 10 images, each with its place in the whole set as its label."""
    shards = listing.list_shards([str(pictures.write_pool(folder / "pool", 5, 10))])
    return [
        LabeledShard(shard, np.arange(number * 10, number * 10 + 10, dtype=np.int32))
        for number, shard in enumerate(shards)
    ]


def data_of(shards: list[LabeledShard], seed: int = 1, ranks: DistributedContext = ALONE) -> TrainDataset:
    """The training data of one rank."""
    return TrainDataset(shards, SampleFields(), TINY, seed, ranks)


def order(data: TrainDataset, batch_size: int, steps: int) -> list[int]:
    """The labels in the order that the model sees them."""
    return [int(label) for batch in data.batches(batch_size, steps) for label in batch.labels_B]


@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_an_epoch_shows_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    seen = order(data_of(labeled(tmp_path)), 7, 50 * 3 // 7)
    assert Counter(seen[:50]) == Counter(range(50))
    assert Counter(seen[50:100]) == Counter(range(50))
    assert seen[:50] != seen[50:100]


def test_the_seed_decides_order_and_pixels(tmp_path: Path) -> None:
    shards = labeled(tmp_path)
    first, again, other = (data_of(shards, seed) for seed in (1, 1, 2))
    batches = [[batch.images_BHWC for batch in data.batches(16, 5)] for data in (first, again)]
    assert all(np.array_equal(one, two) for one, two in zip(*batches, strict=True))
    assert order(first, 16, 5) == order(again, 16, 5) != order(other, 16, 5)


@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_data_go_on_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = labeled(tmp_path)
    whole = list(data_of(shards).batches(7, 30))
    for done in (1, 7, 8, 20, 29):  # 7 x 7 is one short of an epoch, 8 x 7 in the second
        rest = list(data_of(shards).batches(7, 30, done))
        assert [batch.keys for batch in rest] == [batch.keys for batch in whole[done:]]
        assert all(np.array_equal(*pair) for pair in zip(rest[0].images_BHWC, whole[done].images_BHWC, strict=True))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("window_bytes", [1, 4_000, 1 << 30])
def test_the_ranks_share_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, count: int
) -> None:
    """Together they cut the batches that one process would: every sample of an epoch once, by one rank."""
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = labeled(tmp_path)
    alone = list(data_of(shards).batches(10, 10))
    parts = [list(data_of(shards, ranks=DistributedContext(rank, count)).batches(10, 10)) for rank in range(count)]
    for step, batch in enumerate(alone):
        assert np.array_equal(np.concatenate([part[step].images_BHWC for part in parts]), batch.images_BHWC)
        assert [key for part in parts for key in part[step].keys] == batch.keys
    for epoch in (slice(0, 5), slice(5, 10)):
        labels = [int(label) for part in parts for batch in part[epoch] for label in batch.labels_B]
        assert sorted(labels) == list(range(50))


def test_class_folders_are_dealt_out_before_they_are_windowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", 4_000)
    monkeypatch.setattr(sample_source, "FILES_PER_RESHARD", 10)
    monkeypatch.setattr(listing, "FILES_PER_SHARD", 10)
    folders = pictures.write_folders(tmp_path / "labeled", 30)
    shards = [
        LabeledShard(shard, np.array([sorted(pictures.CLASSES).index(file.name.split("/")[0]) for file in shard.files]))
        for shard in listing.list_shards([str(folders)])
    ]
    assert np.mean([len(set(shard.labels.tolist())) for shard in shards]) < 2
    data = data_of(shards)
    seen = [key for batch in data.batches(9, 10) for key in batch.keys]
    assert sorted(seen) == sorted(file.name for shard in shards for file in shard.shard.files)
    assert len(set(order(data, 9, 1))) == 3


def test_a_photograph_is_cut_to_size() -> None:
    image = np.arange(300 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 200, 3)
    settings = Preprocessing(resolution=64, augmentation="crop-flip")
    assert center_crop(image, settings).shape == (64, 64, 3)
    for seed in range(20):
        cut = random_resized_crop(image, settings, np.random.default_rng(seed).random(23))
        assert cut.shape == (64, 64, 3)


def test_a_large_photograph_is_decoded_at_the_size_that_is_needed() -> None:
    """A smooth picture: reduced while it is decoded or afterwards, the same cut to within a few levels."""
    y, x = np.mgrid[:900, :1203] / 1203
    image = (255 * np.stack([x, y, (np.sin(9 * x) + 1) / 2], axis=2)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    data = file.getvalue()
    settings = Preprocessing(resolution=64, augmentation="crop-flip")
    reductions = set()
    for seed in range(40):
        randoms_R = np.random.default_rng(seed).random(23)
        by = jpeg_scale_denominator(900, 1203, settings, randoms_R)
        reductions.add(by)
        reduced = decode_image(data, lambda height, width, by=by: by)  # type: ignore[misc]
        assert reduced.shape == (-(-900 // by), -(-1203 // by), 3)
        cut, whole = (
            random_resized_crop(pixels, settings, randoms_R, (900, 1203)) for pixels in (reduced, decode_image(data))
        )
        assert np.abs(cut.astype(int) - whole).mean() < 2.5  # a quarter of a pixel of the reduced image
    assert {4, 8} <= reductions <= {2, 4, 8}
    whole_R = np.array([1.0, 0.5] * 11 + [0.0])  # all of the area, a square
    assert [jpeg_scale_denominator(side, side, settings, whole_R) for side in (40, 127, 128, 255, 256, 5000)] == [
        1,
        1,
        2,
        2,
        4,
        8,
    ]


def test_a_tiny_image_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(center_crop(image, TINY), image)


def test_training_learns_and_is_found_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
def test_a_share_is_cut_into_nearly_equal_parts(images: int, at_most: int, sizes: list[int]) -> None:
    parts = split_microbatches(images, at_most)
    assert [part.stop - part.start for part in parts] == sizes
    assert [place for part in parts for place in range(images)[part]] == list(range(images))


@pytest.mark.parametrize("at_once", [12, 5, 1])
def test_a_step_is_that_of_the_whole_batch_in_however_many_parts(at_once: int) -> None:
    """Of a network that looks at each image alone: SGD by hand, on the gradient of the mean loss."""
    config = TrainConfig(
        workdir="", recipe="teacher", architecture="", plan="", batch_size=12, device_batch_size=at_once,
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
    expected = [one - 0.3 * (slope + 0.01 * one) for one, slope in zip(model.parameters(), gradients, strict=True)]
    train_step = TrainStep(config, TrainState(config, model, 100), 100, 0, torch.device("cpu"), ALONE)
    assert train_step.all_reduce_step(batch, 0.3, 1).item() == pytest.approx(loss.item())
    for found, one in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(found, one, atol=1e-6)


def test_a_device_without_enough_memory_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr("semiscale.stages.train.train_step.training_loss", too_large)
    line = r"^train: CUDA out of memory. Tried to allocate 2.00 GiB. Lower device_batch_size, which is 24: [^\n]*$"
    with pytest.raises(SemiscaleError, match=line):
        Stages(tmp_path).train("teacher", device_batch_size=24)


def test_a_batch_one_larger_than_a_part_is_trained_on(tmp_path: Path) -> None:
    """Batch normalisation refuses a part of one image of 1 x 1 pixels, which this network ends in."""
    receipt = Stages(tmp_path).train("teacher", batch_size=25, device_batch_size=24, images_processed=50, resolution=1)
    assert [point.images_processed for point in receipt.curve] == [25, 50]


def test_one_image_that_leaves_one_number_to_normalise_is_refused(tmp_path: Path) -> None:
    line = "^device_batch_size: resnet8_small .*SEMI-E145"
    with pytest.raises(InvalidInputError, match=line):
        Stages(tmp_path).train("teacher", batch_size=2, device_batch_size=1, images_processed=2, resolution=1)


def test_the_receipt_says_what_was_processed_not_what_was_asked_for(tmp_path: Path) -> None:
    receipt = Stages(tmp_path).train("teacher", batch_size=24, images_processed=50)
    assert receipt.images_processed == receipt.curve[-1].images_processed == 72


@pytest.mark.parametrize("steps", [50, 130])
def test_every_training_is_validated_ten_times(tmp_path: Path, steps: int) -> None:
    """At equal steps, whether the curve has a point at every step or at fewer."""
    curve = Stages(tmp_path).train("teacher", images_processed=6 * steps, batch_size=6).curve
    assert len(curve) == min(steps, 100)
    validated = [point.images_processed / 6 for point in curve if point.validation_top1 is not None]
    assert validated == [-(-part * steps // 10) for part in range(1, 11)]


def test_equal_trainings_leave_equal_bytes(tmp_path: Path) -> None:
    first, second = Stages(tmp_path / "a"), Stages(tmp_path / "b")
    assert Path(first.teacher.checkpoint).read_bytes() == Path(second.teacher.checkpoint).read_bytes()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CURVE_POINTS", 1)
    monkeypatch.setitem(
        finite_loss_guard.FINITE_CHECK_INTERVAL, "cpu", 16
    )  # as on a GPU, where looking waits for the device
    line = r"the loss is nan after 24 images \(step 2, learning rate [\d.e+]+\).*blue/003.png.*and 2 more.*SEMI-E233"
    with pytest.raises(SemiscaleError, match=line) as error:
        Stages(tmp_path).train("teacher", learning_rate=1e30, images_processed=480)
    told = json.loads(Path(re.findall(r"see (.*?)\)", str(error.value))[0]).read_text())
    assert (told["step"], len(told["keys"])) == (2, 12)


@pytest.mark.parametrize(
    ("recipe", "needs"), [("pretrain", "--packed. .SEMI-E232"), ("finetune", "--start.*SEMI-E240")]
)
def test_a_recipe_names_the_receipt_it_needs(tmp_path: Path, recipe: str, needs: str) -> None:
    with pytest.raises(InvalidInputError, match=f"recipe {recipe} needs .*{needs}"):
        Stages(tmp_path).train(recipe)


def test_a_model_of_the_same_classes_in_another_order_is_refused(tmp_path: Path) -> None:
    """The list of classes was changed between the two trainings: the same names, other numbers."""
    stages = Stages(tmp_path)
    teacher = stages.train("teacher", images_processed=12)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(reversed(pictures.CLASSES)))
    again = Stages.on(stages.config, tmp_path)
    assert again.train("teacher", images_processed=12).digest != teacher.digest, "another training"
    line = "'red' for 'blue'.*SEMI-E244"
    with pytest.raises(InvalidInputError, match=line):
        again.train("finetune", images_processed=12, start=stages.uri(teacher))
