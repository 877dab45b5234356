"""Test that checkpoints are written while the training goes on, and what they cost."""

import threading
import time
from pathlib import Path

import pytest
import torch

from semiscale.common.errors import SemiscaleError
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress
from semiscale.stages.train.checkpoint_writer import MAX_COST, CheckpointWriter


def progress_at(step: int) -> TrainerProgress:
    return TrainerProgress(step=step, images_processed=10 * step, ranks=1, seconds=0.0, curve=[])


def build_writer(folder: Path, interval_s: float, *, shares_cpu: bool = True) -> CheckpointWriter:
    return CheckpointWriter(CheckpointManager(str(folder)), "teacher", interval_s, shares_cpu=shares_cpu)


def wait_until_due(writer: CheckpointWriter) -> None:
    deadline = time.monotonic() + 60
    while not writer.is_due():
        assert time.monotonic() < deadline


def test_a_checkpoint_has_the_state_of_its_step_while_later_steps_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    can_upload = threading.Event()
    save = CheckpointManager.save

    def save_later(self: CheckpointManager, *args: object) -> None:
        assert can_upload.wait(60)
        save(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointManager, "save", save_later)
    writer, weights = build_writer(tmp_path, 1e-6), torch.zeros(3)
    writer.save(progress_at(1), {"weights": weights})
    weights.add_(1)
    assert not writer.is_due(), "one checkpoint is written at a time"
    can_upload.set()
    writer.wait()
    progress, tensors = CheckpointManager(str(tmp_path)).load_latest() or pytest.fail("no checkpoint")
    assert progress.step == 1
    assert tensors["weights"].tolist() == [0, 0, 0]


def test_the_next_checkpoint_completes_the_one_before_it(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, 1e-6)
    for step in range(1, 6):
        writer.save(progress_at(step), {"weights": torch.full((3,), float(step))})
    writer.wait()
    progress, tensors = CheckpointManager(str(tmp_path)).load_latest() or pytest.fail("no checkpoint")
    assert (progress.step, tensors["weights"][0].item()) == (5, 5.0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4, "two checkpoints of two objects"


def test_a_failing_store_fails_the_training_at_its_next_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in place of the folder")
    writer = build_writer(tmp_path, 1e-6)
    writer.save(progress_at(1), {"weights": torch.zeros(3)})
    with pytest.raises(OSError, match="checkpoints"):
        wait_until_due(writer)
    # The error is raised once.
    writer.wait()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    writer = build_writer(tmp_path, 1e-6)
    writer.save(progress_at(7), {"weights": torch.tensor([0.0, value])})
    with pytest.raises(SemiscaleError, match=r"after step 7\..*SEMI-E235"):
        writer.wait()
    assert CheckpointManager(str(tmp_path)).load_latest() is None


@pytest.mark.parametrize("shares_cpu", [False, True])
def test_checkpoints_take_at_most_their_share_of_the_time(tmp_path: Path, shares_cpu: bool) -> None:
    writer = build_writer(tmp_path, 0.001, shares_cpu=shares_cpu)
    # 40 MB take some milliseconds to copy and more to write.
    state = {f"weights {number}": torch.randn(1_000_000) for number in range(10)}
    started = time.monotonic()
    writer.save(progress_at(1), state)
    blocked_s = time.monotonic() - started
    writer.wait()
    assert MAX_COST * writer.interval_s > blocked_s / 2, "the copy is most of what the training waits for"
    assert not writer.is_due()
    alone = build_writer(tmp_path / "other", 10_000)
    alone.save(progress_at(1), state)
    alone.wait()
    assert alone.interval_s == 10_000, "the configured interval costs less"
