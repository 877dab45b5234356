"""Test trainings in real processes that are killed, stopped or distributed.

They must give the result of an undisturbed training.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.common.signals import TerminatedError
from semiscale.stages.train import distributed
from semiscale.stages.train.checkpoint_manager import CheckpointManager
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.support.stages import Stages
from tests.support.trainings import (
    LONG,
    assert_equal,
    list_checkpoints,
    start_training,
    training_config,
    wait_for_a_checkpoint,
)


@pytest.mark.parametrize(
    ("kills", "recipe"),
    [
        (2, "teacher"),
        pytest.param(10, "teacher", marks=pytest.mark.slow),
        pytest.param(5, "modern", marks=pytest.mark.slow),
    ],
)
def test_a_training_that_is_killed_at_random_steps_gives_the_same_result(
    tmp_path: Path, kills: int, recipe: str
) -> None:
    stages = Stages(tmp_path)
    # About 40 steps lie between two kills, so no machine reaches the end before the last kill.
    steps = 150 * kills
    long = {"recipe": recipe, "images_processed": steps * LONG["batch_size"]}
    # The images are shifted and mirrored at random, so order and augmentation must resume exactly.
    undisturbed = train(training_config(stages, str(tmp_path / "undisturbed"), checkpoint_minutes=10, **long))
    config = training_config(stages, str(tmp_path / "disturbed"), **long)
    rng = random.Random(kills)
    for number in range(kills):
        process = start_training(config)
        wait_for_a_checkpoint(config, process)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
        output = process.communicate(timeout=300)[0].decode()
        expected = 128 + signal.SIGTERM if number % 2 else -signal.SIGKILL
        assert process.returncode == expected, output
        assert number % 2 == 0 or "SEMI-E002" in output
        # There are two checkpoints, or three if the kill came before the deletion of the oldest one.
        assert len(list_checkpoints(config)) <= 3
    assert 0 < json.loads(storage.read_bytes(list_checkpoints(config)[-1]))["moment"]["step"] < steps
    assert_equal(train(config.model_copy(update={"checkpoint_minutes": 10})), undisturbed)
    assert len(list_checkpoints(config)) == 2


def train_and_stop(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until three checkpoints have been saved, and stop by SIGTERM."""
    save, saved = CheckpointManager.save, []

    def save_and_stop(self: CheckpointManager, *args: Any) -> None:
        save(self, *args)
        saved.append(self)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", save_and_stop)
        with pytest.raises(TerminatedError):
            train(config)


@pytest.mark.parametrize("damage", ["truncated tensors", "a changed byte", "no tensors", "a truncated manifest"])
def test_a_damaged_checkpoint_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    stages = Stages(tmp_path)
    short = {"images_processed": 200, "checkpoint_minutes": 0}
    undisturbed = train(training_config(stages, str(tmp_path / "undisturbed"), images_processed=200))
    config = training_config(stages, str(tmp_path / "disturbed"), **short)
    train_and_stop(config, monkeypatch)
    before, newest = list_checkpoints(config)
    tensors = Path(newest.removesuffix(".json") + ".safetensors")
    data = tensors.read_bytes()
    changes = {
        "truncated tensors": (tensors, data[:-100]),
        "a changed byte": (tensors, data[:-1] + bytes([data[-1] ^ 1])),
        "a truncated manifest": (Path(newest), Path(newest).read_bytes()[:-10]),
    }
    if damage == "no tensors":
        tensors.unlink()
    else:
        path, content = changes[damage]
        path.write_bytes(content)
    capfd.readouterr()
    assert_equal(train(config), undisturbed)
    output = capfd.readouterr().out
    assert f"{newest}: not a whole checkpoint" in output
    step = json.loads(storage.read_bytes(before))["moment"]["step"] if Path(before).exists() else 0
    assert not step or f"going on after {step * 5:,} images" in output


@pytest.mark.parametrize("change", [{"architecture": "resnet14_small"}, {"images_processed": 100}, {"batch_size": 10}])
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Change the network, the length or the batch size of a training."""
    stages = Stages(tmp_path)
    config = training_config(stages, str(tmp_path / "work"), images_processed=200, checkpoint_minutes=0)
    train_and_stop(config, monkeypatch)
    other = config.model_copy(update=change)
    shutil.copytree(f"{config.folder()}/checkpoints", f"{other.folder()}/checkpoints")
    with pytest.raises(InvalidInputError, match=rf"{config.digest()}.*SEMI-E241"):
        train(other)


def test_a_training_resumes_from_checkpoints_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gs_bucket: str
) -> None:
    stages = Stages(tmp_path)
    undisturbed = train(training_config(stages, str(tmp_path / "undisturbed"), images_processed=100))
    config = training_config(stages, gs_bucket, images_processed=100, checkpoint_minutes=0)
    train_and_stop(config, monkeypatch)
    assert len(list_checkpoints(config)) == 2
    assert_equal(train(config), undisturbed)
    lines = storage.read_bytes(storage.join(config.folder(), "metrics.jsonl")).splitlines()
    assert [json.loads(line)["images_processed"] for line in lines] == list(range(5, 101, 5))


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [
        # Slices of 6 and 7 images.
        (2, 13, 1),
        # Slices of 4, 4 and 5 images.
        pytest.param(3, 13, 1, marks=pytest.mark.slow),
        # Microbatches of 6 and 6 images on one rank, and of 6 and 7 on the other.
        pytest.param(2, 25, 2, marks=pytest.mark.slow),
        pytest.param(2, 12, 1, marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, size: int, parts: int
) -> None:
    """Divide the batch into the same microbatches, which batch normalization sees."""
    stages = Stages(tmp_path)
    device_batch = -(-size // (count * parts))
    shared = {
        "batch_size": size, "device_batch_size": device_batch, "images_processed": 20 * size, "learning_rate": 0.5,
        "checkpoint_minutes": 10,
    }  # fmt: skip
    alone = train(training_config(stages, str(tmp_path / "alone"), **shared))
    monkeypatch.setattr(distributed, "local_device_count", lambda: count)
    together = train(training_config(stages, str(tmp_path / "together"), **shared))
    losses = [[point.loss for point in receipt.curve] for receipt in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert together.images_processed == 20 * size


@pytest.mark.slow
def test_ranks_mix_their_images_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Mixup and CutMix are drawn for a microbatch by its offset in the global batch, and not for a rank.
    stages = Stages(tmp_path)
    shared = {"recipe": "modern", "batch_size": 12, "device_batch_size": 6, "images_processed": 120}
    alone = train(training_config(stages, str(tmp_path / "alone"), checkpoint_minutes=10, **shared))
    monkeypatch.setattr(distributed, "local_device_count", lambda: 2)
    together = train(training_config(stages, str(tmp_path / "together"), checkpoint_minutes=10, **shared))
    losses = [[point.loss for point in receipt.curve] for receipt in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_training_resumes_with_another_number_of_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    config = training_config(stages, str(tmp_path / "work"))
    process = start_training(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")
    wait_for_a_checkpoint(config, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode != 0, output
    # SIGTERM adds a checkpoint to the one that this test has waited for.
    assert output.count("checkpoint after") >= 2, output
    moment = json.loads(storage.read_bytes(list_checkpoints(config)[-1]))["moment"]
    assert moment["ranks"] == 2
    receipt = train(config.model_copy(update={"checkpoint_minutes": 10}))
    assert f"going on after {moment['images_processed']:,} images by 2 ranks, now with 1" in capfd.readouterr().out
    assert receipt.curve[-1].images_processed == 1500
    assert [point.images_processed for point in receipt.curve] == list(range(15, 1501, 15))


def test_the_failure_of_a_rank_is_the_failure_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = Stages(tmp_path)
    monkeypatch.setattr(distributed, "local_device_count", lambda: 2)
    with pytest.raises(InvalidInputError, match="exit code 2.*SEMI-E248"):
        train(training_config(stages, str(tmp_path / "work"), batch_size=1))
    assert "refused: batch_size: 1 images" in capfd.readouterr().err
