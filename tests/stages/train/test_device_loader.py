"""Training batches made in a process of their own: those of this process, whatever the set, the rank and the step."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from semiscale.common.errors import SemiscaleError
from semiscale.data import listing
from semiscale.data.labeled import LabeledShard
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline import dataset as training_data
from semiscale.stages.train.input_pipeline.augmentation import Augment
from semiscale.stages.train.input_pipeline.dataset import TrainDataset, TrainingBatch
from semiscale.stages.train.input_pipeline.device_loader import batches_from_worker
from tests.support import pictures, videos
from tests.support.pictures import jpeg, photographs
from tests.support.processes import besides
from tests.support.trainings import numbered

CROPPED = Preprocessing(resolution=32, augmentation="crop-flip")
CLIPS = Preprocessing(resolution=16, augmentation="crop-flip", frames=4)


def photographs_of(root: Path) -> list[LabeledShard]:
    found = listing.list_shards(photographs(root / "photographs", 6, 10))
    return [LabeledShard(shard, np.arange(10, dtype=np.int32)) for shard in found]


def assert_same(found: Iterator[TrainingBatch], expected: Iterator[TrainingBatch], batches: int) -> None:
    count = 0
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.images_BHWC, other.images_BHWC)
        assert np.array_equal(one.labels_B, other.labels_B)
        assert one.keys == other.keys
        count += 1
    assert count == batches


@pytest.mark.parametrize("window_bytes", [9_000, 1 << 30])
def test_photographs_that_fit_in_memory_or_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = photographs_of(tmp_path)
    for ranks in (DistributedContext(), DistributedContext(1, 2)):
        data = TrainDataset(shards, SampleFields(), CROPPED, 5, ranks, Augment(CROPPED, 0.5))
        assert_same(batches_from_worker(data, 9, 12, 2), data.batches(9, 12, 2), 10)


def test_videos(tmp_path: Path) -> None:
    tar = pictures.write_tar(
        tmp_path / "v.tar", {f"{number}.avi": videos.video(number % 3, number) for number in range(4)}
    )
    (shard,) = listing.list_shards([str(tar)], videos=True)
    data = TrainDataset(
        [LabeledShard(shard, np.arange(4, dtype=np.int32))], SampleFields(videos=True), CLIPS, 5, DistributedContext()
    )
    assert_same(batches_from_worker(data, 3, 4, 0), data.batches(3, 4), 4)


def test_an_image_that_cannot_be_read_any_more_is_named(tmp_path: Path) -> None:
    tar = pictures.write_tar(tmp_path / "damaged.tar", {"0.jpg": jpeg(0), "1.jpg": b"\0" + jpeg(1)})
    (shard,) = listing.list_shards([str(tar)])
    data = TrainDataset(
        [LabeledShard(shard, np.arange(2, dtype=np.int32))], SampleFields(), CROPPED, 5, DistributedContext()
    )
    with pytest.raises(SemiscaleError, match=r"1: not an image.*SEMI-E243"):
        list(batches_from_worker(data, 2, 6, 0))


def test_a_process_that_is_lost_is_named_and_another_goes_on(tmp_path: Path) -> None:
    data = TrainDataset(numbered(tmp_path, [20, 20]), SampleFields(), CROPPED, 5, DistributedContext())
    batches = batches_from_worker(data, 10, 10**6, 0)
    next(batches)
    (victim,) = besides(os.getpid())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(
        SemiscaleError, match="the process that reads and decodes training images .*exit code -9.*SEMI-E004"
    ):
        list(batches)
    assert_same(batches_from_worker(data, 10, 6, 2), data.batches(10, 6, 2), 4)
