"""Training batches made in a process of their own: those of this process, whatever the set, the rank and the step."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from components.shared import shards as sharding
from components.shared.errors import SemiscaleError
from components.shared.receipts import Preprocessing
from components.shared.shards import Columns
from components.shared.splits import LabeledShard
from components.train import data as training_data
from components.train.augment import Augment
from components.train.data import TrainingBatch, TrainingData
from components.train.feed import made_beside
from components.train.ranks import Ranks
from tests import pictures, videos
from tests.pictures import jpeg, photographs
from tests.processes import besides
from tests.trainings import numbered

CROPPED = Preprocessing(resolution=32, augmentation="crop-flip")
CLIPS = Preprocessing(resolution=16, augmentation="crop-flip", frames=4)


def photographs_of(root: Path) -> list[LabeledShard]:
    found = sharding.find(photographs(root / "photographs", 6, 10))
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
    monkeypatch.setattr(training_data, "WINDOW_BYTES", window_bytes)
    shards = photographs_of(tmp_path)
    for ranks in (Ranks(), Ranks(1, 2)):
        data = TrainingData(shards, Columns(), CROPPED, 5, ranks, Augment(CROPPED, 0.5))
        assert_same(made_beside(data, 9, 12, 2), data.batches(9, 12, 2), 10)


def test_videos(tmp_path: Path) -> None:
    tar = pictures.write_tar(
        tmp_path / "v.tar", {f"{number}.avi": videos.video(number % 3, number) for number in range(4)}
    )
    (shard,) = sharding.find([str(tar)], videos=True)
    data = TrainingData([LabeledShard(shard, np.arange(4, dtype=np.int32))], Columns(videos=True), CLIPS, 5, Ranks())
    assert_same(made_beside(data, 3, 4, 0), data.batches(3, 4), 4)


def test_an_image_that_cannot_be_read_any_more_is_named(tmp_path: Path) -> None:
    tar = pictures.write_tar(tmp_path / "damaged.tar", {"0.jpg": jpeg(0), "1.jpg": b"\0" + jpeg(1)})
    (shard,) = sharding.find([str(tar)])
    data = TrainingData([LabeledShard(shard, np.arange(2, dtype=np.int32))], Columns(), CROPPED, 5, Ranks())
    with pytest.raises(SemiscaleError, match=r"1: not an image; it was readable when the run was planned, was it"):
        list(made_beside(data, 2, 6, 0))


def test_a_process_that_is_lost_is_named_and_another_goes_on(tmp_path: Path) -> None:
    data = TrainingData(numbered(tmp_path, [20, 20]), Columns(), CROPPED, 5, Ranks())
    batches = made_beside(data, 10, 10**6, 0)
    next(batches)
    (victim,) = besides(os.getpid())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(
        SemiscaleError, match="the process that reads and decodes training images was lost .exit code -9"
    ):
        list(batches)
    assert_same(made_beside(data, 10, 6, 2), data.batches(10, 6, 2), 4)
