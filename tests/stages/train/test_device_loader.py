"""Compare the batches of a worker process with those of this process.

They must be equal for every set, rank and step.
"""

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
from tests.support import sample_images, videos
from tests.support.processes import worker_processes
from tests.support.sample_images import draw_jpeg, write_photographs
from tests.support.trainings import write_numbered_tars

CROPPED = Preprocessing(resolution=32, augmentation="crop-flip")
CLIPS = Preprocessing(resolution=16, augmentation="crop-flip", frames=4)


def write_photograph_shards(root: Path) -> list[LabeledShard]:
    """Write six shards of ten photographs. The label is the number in the shard."""
    shards = listing.list_shards(write_photographs(root / "photographs", 6, 10))
    return [LabeledShard(shard, np.arange(10, dtype=np.int32)) for shard in shards]


def assert_same(actual: Iterator[TrainingBatch], expected: Iterator[TrainingBatch], batches: int) -> None:
    """Check that the batches are equal, and count them."""
    count = 0
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert np.array_equal(batch.images_BHWC, expected_batch.images_BHWC)
        assert np.array_equal(batch.labels_B, expected_batch.labels_B)
        assert batch.keys == expected_batch.keys
        count += 1
    assert count == batches


@pytest.mark.parametrize("window_bytes", [9_000, 1 << 30])
def test_batches_of_photographs_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    shards = write_photograph_shards(tmp_path)
    for ranks in (DistributedContext(), DistributedContext(1, 2)):
        data = TrainDataset(shards, SampleFields(), CROPPED, 5, ranks, Augment(CROPPED, 0.5))
        assert_same(batches_from_worker(data, 9, 12, 2), data.batches(9, 12, 2), 10)


def test_batches_of_videos_are_the_same(tmp_path: Path) -> None:
    tar = sample_images.write_tar(
        tmp_path / "v.tar", {f"{number}.avi": videos.draw_video(number % 3, number) for number in range(4)}
    )
    (shard,) = listing.list_shards([str(tar)], videos=True)
    data = TrainDataset(
        [LabeledShard(shard, np.arange(4, dtype=np.int32))], SampleFields(videos=True), CLIPS, 5, DistributedContext()
    )
    assert_same(batches_from_worker(data, 3, 4, 0), data.batches(3, 4), 4)


def test_the_error_names_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    tar = sample_images.write_tar(tmp_path / "damaged.tar", {"0.jpg": draw_jpeg(0), "1.jpg": b"\0" + draw_jpeg(1)})
    (shard,) = listing.list_shards([str(tar)])
    data = TrainDataset(
        [LabeledShard(shard, np.arange(2, dtype=np.int32))], SampleFields(), CROPPED, 5, DistributedContext()
    )
    with pytest.raises(SemiscaleError, match=r"1: not an image.*SEMI-E243"):
        list(batches_from_worker(data, 2, 6, 0))


def test_a_killed_worker_process_is_an_error_and_a_new_one_resumes(tmp_path: Path) -> None:
    data = TrainDataset(write_numbered_tars(tmp_path, [20, 20]), SampleFields(), CROPPED, 5, DistributedContext())
    batches = batches_from_worker(data, 10, 10**6, 0)
    next(batches)
    (victim,) = worker_processes(os.getpid())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(
        SemiscaleError, match="the process that reads and decodes training images .*exit code -9.*SEMI-E004"
    ):
        list(batches)
    assert_same(batches_from_worker(data, 10, 6, 2), data.batches(10, 6, 2), 4)
