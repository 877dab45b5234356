"""Test the order of a training set that is larger than memory.

The order is compared with its definition. In an epoch, one of the ranks reads each sample once.
"""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semiscale import storage
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline import dataset as training_data
from semiscale.stages.train.input_pipeline.dataset import TrainDataset
from semiscale.stages.train.input_pipeline.interleaved_order import num_streams
from semiscale.stages.train.stage import train
from tests.support import sample_images
from tests.support.stages import Stages
from tests.support.trainings import assert_equal, list_checkpoints, run_logged, training_config, write_numbered_tars

PIXELS = Preprocessing(resolution=8, augmentation="shift")
# Bytes of a padded image.
HELD_BYTES = 3 * 10 * 10
# Six photographs.
WINDOW_BYTES = 9_000
SEED = 3


def order_by_definition(sizes: list[int], batch_size: int, steps: int, window: int) -> list[int]:
    """Return the samples of a training in the order of the definition."""
    streams = max(streams for streams in (1, 2, 4, 8, 16, 32, 64) if streams <= min(batch_size, len(sizes)))
    # The stream of each position in a batch.
    stream_of = [
        stream
        for stream in range(streams)
        for _ in range(stream * batch_size // streams, (stream + 1) * batch_size // streams)
    ]
    shards = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    shown = [0] * streams
    shuffled: dict[int, int] = {}
    for epoch in range(batch_size * steps // sum(sizes) + 1):
        order = np.random.default_rng([SEED, 0, epoch]).permutation(len(sizes))
        remaining = [number for shard in order for number in shards[shard].tolist()]
        positions = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        for stream in range(streams):
            own = [position for position in positions if stream_of[position % batch_size] == stream]
            part, remaining = remaining[: len(own)], remaining[len(own) :]
            for start in range(0, len(own), window):
                samples = part[start : start + window]
                rng = np.random.default_rng([SEED, 5, stream, shown[stream] + start])
                permutation = rng.permutation(len(samples))
                shuffled |= {own[start + number]: samples[index] for number, index in enumerate(permutation)}
            shown[stream] += len(own)
    return [shuffled[position] for position in range(batch_size * steps)]


@pytest.mark.parametrize("batch_size", [1, 7, 10, 16])
@pytest.mark.parametrize("images", [1, 12, 40])
def test_the_order_is_that_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, images: int
) -> None:
    sizes = [10, 3, 14, 1, 9, 12, 8]
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", HELD_BYTES * images)
    data = TrainDataset(write_numbered_tars(tmp_path, sizes), SampleFields(), PIXELS, SEED, DistributedContext())
    seen = [int(label) for batch in data.batches(batch_size, 150 // batch_size) for label in batch.labels_B]
    window = max(images // num_streams(batch_size, len(sizes)), 1)
    assert seen == order_by_definition(sizes, batch_size, 150 // batch_size, window)


def count_read_bytes() -> int:
    """Return the bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_rank_reads_only_its_share_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    shards = write_numbered_tars(tmp_path, [25, 35] * 32)
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", HELD_BYTES * 100)
    sizes = [shard.shard.size_bytes for shard in shards]
    streams = num_streams(8, 64) // count
    for rank in range(count):
        data = TrainDataset(shards, SampleFields(), PIXELS, SEED, DistributedContext(rank, count))
        before = count_read_bytes()
        assert sum(len(batch.keys) for batch in data.batches(8, 240)) == 30 * 64 // count, "an epoch"
        share = sum(sizes) / count
        assert 0.9 * share < count_read_bytes() - before < share + streams * max(sizes)


def build_config(stages: Stages, workdir: Path, **changes: Any) -> TrainConfig:
    """Return a training on random crops of photographs."""
    return training_config(stages, str(workdir), augmentation="crop-flip", resolution=16, **changes)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_one_rank_sees_each_sample_of_an_epoch_once(tmp_path: Path, count: int) -> None:
    """Train on 48 samples in batches of 7, so epochs begin inside batches.

    With 3 ranks, two ranks share a stream. With 2 ranks, none is shared.
    """
    stages = Stages(tmp_path, labeled=sample_images.write_photographs(tmp_path / "photographs", 8, 6))
    config = build_config(stages, tmp_path / "work", batch_size=7, images_processed=3 * 48, checkpoint_minutes=10)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={count} -m --".split()
    done = run_logged(config, WINDOW_BYTES, tmp_path / "keys", *torchrun)
    assert done.returncode == 0, done.stdout.decode()
    logs = [(tmp_path / "keys" / f"{rank}.jsonl").read_text().splitlines() for rank in range(count)]
    assert {len(log) for log in logs} == {21}
    shown = [key for lines in zip(*logs, strict=True) for line in lines for key in json.loads(line)["keys"]]
    for epoch in range(3):
        assert Counter(shown[48 * epoch : 48 * (epoch + 1)]) == Counter(f"{number:05}" for number in range(48))
    assert shown[:48] != shown[48:96] != shown[96:144]


@pytest.mark.parametrize("window_bytes", [WINDOW_BYTES, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_killed_training_on_photographs_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    """Kill a training in the middle of an epoch.

    Several threads decode and crop the photographs, which are in memory or in streams.
    """
    monkeypatch.setattr(training_data, "SHUFFLE_BUFFER_BYTES", window_bytes)
    stages = Stages(tmp_path, labeled=sample_images.write_photographs(tmp_path / "photographs", 8, 6))
    long = {"batch_size": 7, "images_processed": 7 * 30}
    undisturbed = train(build_config(stages, tmp_path / "undisturbed", checkpoint_minutes=10, **long))
    config = build_config(stages, tmp_path / "disturbed", checkpoint_minutes=0, **long)
    killed = run_logged(config, window_bytes, tmp_path / "keys", killed_at=17)
    assert killed.returncode == -signal.SIGKILL, killed.stdout.decode()
    progress = json.loads(storage.read_bytes(list_checkpoints(config)[-1]))["moment"]
    assert progress["images_processed"] == 16 * 7 == 2 * 48 + 16, "in the third epoch"
    assert_equal(train(config.model_copy(update={"checkpoint_minutes": 10})), undisturbed)
