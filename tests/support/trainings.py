"""Start trainings as real processes, and read their checkpoints."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from semiscale import storage
from semiscale.data import listing
from semiscale.data.labeled import LabeledShard
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.train.config import TrainConfig
from tests.support import sample_images
from tests.support.stages import Stages

# The set has 12 samples, so epochs begin inside batches.
LONG = {"batch_size": 5, "images_processed": 1500, "learning_rate": 0.2}


def training_config(stages: Stages, workdir: str, **changes: Any) -> TrainConfig:
    """Return the config of a training in its own workdir, on the planned set.

    It writes checkpoints several times a second.
    """
    settings = {
        "workdir": workdir,
        "recipe": "teacher",
        "architecture": "resnet8_small",
        "plan": stages.uri(stages.plan),
        "weight_decay": 0.0001,
        "resolution": 8,
        "augmentation": "shift-flip",
        "checkpoint_minutes": 0.001,
        **LONG,
        **changes,
    }
    return TrainConfig.model_validate(settings)


def start_training(config: TrainConfig, *launcher: str) -> subprocess.Popen[bytes]:
    """Start a training as a process, with or without a launcher."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    command = [sys.executable, *(launcher or ["-m"]), "semiscale.stages.train", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ))


def list_checkpoints(config: TrainConfig) -> list[str]:
    """Return the URIs of the checkpoint manifests of a training, the newest last."""
    objects = storage.list_objects(storage.join(config.folder(), "checkpoints"))
    return sorted(entry.uri for entry in objects if entry.uri.endswith(".json"))


def wait_for_a_checkpoint(config: TrainConfig, process: subprocess.Popen[bytes]) -> None:
    """Wait until a training has written another checkpoint or has ended."""
    before = list_checkpoints(config)[-1:]
    while list_checkpoints(config)[-1:] == before and process.poll() is None:
        time.sleep(0.02)


def assert_equal(actual: TrainReceipt, expected: TrainReceipt) -> None:
    """Check that weights and learning curves are equal to the bit."""
    assert storage.read_bytes(actual.checkpoint) == storage.read_bytes(expected.checkpoint)
    assert actual.curve == expected.curve


def write_numbered_tars(folder: Path, sizes: list[int]) -> list[LabeledShard]:
    """Write tars of these sizes. The label of an image is its index in the set."""
    ends = np.cumsum(sizes)
    for shard, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        members = {f"{number:05}.png": sample_images.draw_png(number % 3, number) for number in range(end - size, end)}
        sample_images.write_tar(folder / f"{shard:03}.tar", members)
    shards = listing.list_shards([str(folder)])
    return [
        LabeledShard(shard, np.arange(end - size, end, dtype=np.int32))
        for shard, size, end in zip(shards, sizes, ends, strict=True)
    ]


def run_logged(
    config: TrainConfig, window_bytes: int, folder: Path, *launcher: str, **faults: int
) -> "subprocess.CompletedProcess[bytes]":
    """Train in real processes that log their keys.

    Args:
        config: The config of the training.
        window_bytes: The size of the shuffle buffer.
        folder: The folder of the logs.
        *launcher: The launcher, if there is one.
        **faults: `killed_at`, `broken_at` and `terminated_in`, see tests/support/logged_training.py.
    """
    folder.mkdir()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    command = [sys.executable, *(launcher or ["-m"]), "tests.support.logged_training", *options]
    numbers = {"window_bytes": window_bytes, "killed_at": 0, "broken_at": 0, "terminated_in": 0, **faults}
    environment = {"KEYS": str(folder), **{name.upper(): str(number) for name, number in numbers.items()}}
    # It takes seconds, and minutes on a busy machine.
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}, timeout=600
    )
