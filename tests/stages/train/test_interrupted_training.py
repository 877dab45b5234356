"""Interrupt a training at critical moments, and resume it.

Weights, learning curve and metrics must be those of an undisturbed training. The interruption is an exception in the
process of the test. test_train_restart.py kills real processes at random times.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from semiscale import storage
from semiscale.common.signals import TerminatedError
from semiscale.evaluation import inference
from semiscale.models import checkpoint_io, normalization
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.train import train_step, trainer
from semiscale.stages.train.checkpoint_manager import CheckpointManager
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.support.stages import Stages

STEPS = 20
# Metrics that depend on the process.
TIMES = ("seconds", "images_per_s", "waiting_for_data")
# A function, the number of its call, and whether the interruption comes before or after that call.
INTERRUPTIONS = {
    "in a step": (train_step.TrainStep, "all_reduce_step", 13, "before"),
    "after a validation": (trainer.Trainer, "_all_reduce_validate", 4, "after"),
    "before the tensors of a checkpoint are written": (storage, "upload", 3, "before"),
    "between the tensors and the manifest of a checkpoint": (storage, "upload", 3, "after"),
    "after a checkpoint and before the deletion of an older one": (storage, "delete", 2, "before"),
    "between the deletions of an older manifest and of its tensors": (storage, "delete", 1, "after"),
    "after a checkpoint and before its log line": (CheckpointManager, "save", 7, "after"),
    "after the last checkpoint and before the model": (checkpoint_io, "save_model", 1, "before"),
    "after the model and before the receipt": (checkpoint_io, "save_model", 1, "after"),
}


class InterruptionError(BaseException):
    """An interruption that no handler of the program catches."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a run with a plan."""
    return Stages(tmp_path_factory.mktemp("run"))


def build_config(stages: Stages, workdir: Path, checkpoint_minutes: float) -> TrainConfig:
    """Return a training of a few steps. With 0 minutes, each step writes a checkpoint."""
    return TrainConfig.model_validate(
        {
            "workdir": str(workdir),
            "recipe": "teacher",
            "architecture": "resnet8_small",
            "plan": stages.uri(stages.plan),
            "resolution": 8,
            "augmentation": "shift-flip",
            "batch_size": 5,
            "images_processed": STEPS * 5,
            "checkpoint_minutes": checkpoint_minutes,
        }
    )


@pytest.fixture(scope="module")
def undisturbed(stages: Stages) -> TrainReceipt:
    """Return the receipt of an undisturbed training."""
    return train(build_config(stages, stages.root / "undisturbed", 10))


def read_metrics(receipt: TrainReceipt) -> list[dict[str, Any]]:
    """Return the JSON lines of a training, without metrics that depend on a process."""
    lines = storage.read_bytes(storage.join(receipt.folder, "metrics.jsonl")).splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("validation", [4, 10])
def test_sigterm_interrupts_a_validation(
    stages: Stages, undisturbed: TrainReceipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    """Send SIGTERM twice, at the second of the twelve images of a validation.

    The resumed process gets the second SIGTERM. The tenth validation is the last one.
    """
    forwarded: list[int] = []
    to_normalized_batch = normalization.to_normalized_batch

    def send_sigterm_at_second_image(*args: Any) -> Any:
        forwarded.append(0)
        if len(forwarded) % 12 == 2 and len(forwarded) > 12 * (validation - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return to_normalized_batch(*args)

    config = build_config(stages, tmp_path, 10)
    monkeypatch.setattr(inference, "BATCH", 1)
    with monkeypatch.context() as patch:
        patch.setattr(normalization, "to_normalized_batch", send_sigterm_at_second_image)
        for _ in range(2):
            with pytest.raises(TerminatedError):
                train(config)
            assert len(forwarded) == 12 * (validation - 1) + 2, "no further image is forwarded"
            del forwarded[12 * (validation - 1) :]
    progress, _ = CheckpointManager(config.folder()).load_latest() or pytest.fail("no checkpoint")
    assert progress.step == validation * STEPS // 10, "the step that was to be validated"
    receipt = train(config)
    assert storage.read_bytes(receipt.checkpoint) == storage.read_bytes(undisturbed.checkpoint)
    assert receipt.curve == undisturbed.curve
    assert read_metrics(receipt) == read_metrics(undisturbed)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_training_gives_the_same_bytes(
    stages: Stages, undisturbed: TrainReceipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: str
) -> None:
    owner, name, call_number, when = INTERRUPTIONS[interruption]
    function, calls = getattr(owner, name), []

    def call_or_interrupt(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call_number and when == "before":
            raise InterruptionError
        result = function(*args, **options)
        if len(calls) == call_number:
            raise InterruptionError
        return result

    config = build_config(stages, tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call_or_interrupt)
        with pytest.raises(InterruptionError):
            train(config)
    receipt = train(config)
    assert storage.read_bytes(receipt.checkpoint) == storage.read_bytes(undisturbed.checkpoint)
    assert receipt.curve == undisturbed.curve
    assert read_metrics(receipt) == read_metrics(undisturbed)
    assert [line["images_processed"] for line in read_metrics(receipt)] == list(range(5, STEPS * 5 + 1, 5))
