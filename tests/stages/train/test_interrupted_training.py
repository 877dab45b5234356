"""A training that ends at an unfortunate moment, and goes on: weights, curve and what was watched are all there.

What ends it is raised in the test's own process, at that very moment; test_train_restart.py kills real processes,
at any.
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
TIMES = ("seconds", "images_per_s", "waiting_for_data")  # of a process, not of the training
# Whose call the training does not live to see the end of, or does not outlive, and which one it is.
MOMENTS = {
    "a step": (train_step.TrainStep, "all_reduce_step", 13, "before"),
    "the validation": (trainer.Trainer, "_all_reduce_validate", 4, "after"),
    "a checkpoint, its tensors half written": (storage, "upload", 3, "before"),
    "a checkpoint, its tensors written and nobody to vouch for them": (storage, "upload", 3, "after"),
    "a checkpoint that is whole, an older one not yet deleted": (storage, "delete", 2, "before"),
    "a checkpoint, the voucher of an older one deleted and not its tensors": (storage, "delete", 1, "after"),
    "a checkpoint that is whole, and was not told": (CheckpointManager, "save", 7, "after"),
    "the last checkpoint, and no model": (checkpoint_io, "save_model", 1, "before"),
    "the model, and no receipt": (checkpoint_io, "save_model", 1, "after"),
}


class EndedHereError(BaseException):
    """Nothing that the training would handle."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A planned run."""
    return Stages(tmp_path_factory.mktemp("run"))


def config_of(stages: Stages, workdir: Path, checkpoint_minutes: float) -> TrainConfig:
    """A training of a few steps; with no minutes between them, each step leaves a checkpoint."""
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
    """What the training comes to."""
    return train(config_of(stages, stages.root / "undisturbed", 10))


def watched(receipt: TrainReceipt) -> list[dict[str, Any]]:
    """Return the JSON lines of a training, without the times of its processes."""
    lines = storage.read_bytes(storage.join(receipt.folder, "metrics.jsonl")).splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("validation", [4, 10])
def test_sigterm_ends_a_validation(
    stages: Stages, undisturbed: TrainReceipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    """It comes with the second of the twelve batches of one image; so it does to who goes on. The tenth is the last."""
    forwarded: list[int] = []
    normalised = normalization.to_normalized_batch

    def told_at_the_second(*given: Any) -> Any:
        forwarded.append(0)
        if len(forwarded) % 12 == 2 and len(forwarded) > 12 * (validation - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return normalised(*given)

    config = config_of(stages, tmp_path, 10)
    monkeypatch.setattr(inference, "BATCH", 1)
    with monkeypatch.context() as patch:
        patch.setattr(normalization, "to_normalized_batch", told_at_the_second)
        for _ in range(2):
            with pytest.raises(TerminatedError):
                train(config)
            assert len(forwarded) == 12 * (validation - 1) + 2, "no image more is forwarded"
            del forwarded[12 * (validation - 1) :]
    moment, _ = CheckpointManager(config.folder()).load_latest() or pytest.fail("no checkpoint")
    assert moment.step == validation * STEPS // 10, "the step that was to be validated"
    receipt = train(config)
    assert storage.read_bytes(receipt.checkpoint) == storage.read_bytes(undisturbed.checkpoint)
    assert receipt.curve == undisturbed.curve
    assert watched(receipt) == watched(undisturbed)


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_goes_on_to_the_bit(
    stages: Stages, undisturbed: TrainReceipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    owner, name, which, when = MOMENTS[moment]
    call, calls = getattr(owner, name), []

    def ending(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == which and when == "before":
            raise EndedHereError
        result = call(*given, **named)
        if len(calls) == which:
            raise EndedHereError
        return result

    config = config_of(stages, tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ending)
        with pytest.raises(EndedHereError):
            train(config)
    receipt = train(config)
    assert storage.read_bytes(receipt.checkpoint) == storage.read_bytes(undisturbed.checkpoint)
    assert receipt.curve == undisturbed.curve
    assert watched(receipt) == watched(undisturbed)
    assert [line["images_processed"] for line in watched(receipt)] == list(range(5, STEPS * 5 + 1, 5))
