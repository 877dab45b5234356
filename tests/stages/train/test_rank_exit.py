"""Test how the ranks of a training stop together.

One rank gets SIGTERM or has a loss that is not finite, or the launcher is killed.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.support.processes import has_ended, read_stat
from tests.support.stages import Stages
from tests.support.trainings import list_checkpoints, run_logged, start_training, training_config, wait_for_a_checkpoint

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")
DEADLINE_S = 300


def list_children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the child processes of a process."""
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [child for child in processes if read_stat(child)[1] == str(process.pid)]


def train_logged(root: Path, **moments: int) -> tuple[TrainConfig, str]:
    """Train for 40 steps on two ranks that log their keys, and return the output.

    `moments` are the arguments of `run_logged` that disturb the training.
    """
    config = training_config(Stages(root), str(root / "work"), images_processed=200, checkpoint_minutes=10)
    return config, run_logged(config, 1 << 30, root / "keys", *LAUNCHER, **moments).stdout.decode()


@pytest.mark.slow
def test_sigterm_of_one_rank_interrupts_the_validation_of_another(tmp_path: Path) -> None:
    """Send SIGTERM to rank 1 alone while rank 0 validates, as a drained node does."""
    config, output = train_logged(tmp_path, terminated_in=3)
    assert output.count("failed: SIGTERM: the process was stopped") == 2, output
    assert "exitcode  : 143" in output, output
    assert [path.read_text() for path in (tmp_path / "keys").glob("stopped-*")] == ["1", "1"], (
        "no rank stops before the checkpoint is saved"
    )
    (uri,) = list_checkpoints(config)
    moment = json.loads(storage.read_bytes(uri))["moment"]
    assert moment["step"] == 12, "the third of ten validations, of 40 steps"
    last = moment["curve"][-1]
    assert (last["images_processed"], last["validation_top1"]) == (60, None), "the validation was interrupted"
    receipt = train(config)
    assert [point.images_processed for point in receipt.curve] == list(range(5, 201, 5))
    validated = [point.images_processed for point in receipt.curve if point.validation_top1 is not None]
    assert validated == list(range(20, 201, 20))


@pytest.mark.slow
def test_the_rank_whose_loss_is_not_finite_names_its_images(tmp_path: Path) -> None:
    """Break the loss of rank 1.

    Its gradient breaks the weights of all ranks. The next loss of rank 0 is not finite either, although its images are
    fine.
    """
    _, output = train_logged(tmp_path, broken_at=7)
    lines = [json.loads((tmp_path / "keys" / f"{rank}.jsonl").read_text().splitlines()[6]) for rank in (0, 1)]
    assert [line["step"] for line in lines] == [7, 7]
    assert "the loss is nan after 35 images (step 7, learning rate 0.00390625)" in output
    assert f"at the batch: {', '.join(lines[1]['keys'])} [SEMI-E233]\n" in output
    assert "The loss of step 7 on another rank is not finite. See that rank's log. [SEMI-E234]\n" in output
    assert output.count("failed: train:") == 2
    assert "Connection closed" not in output


@pytest.mark.slow
def test_ranks_stop_if_their_launcher_is_killed(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    # This training would take hours.
    config = training_config(stages, str(tmp_path / "work"), images_processed=500_000)
    launcher = start_training(config, *LAUNCHER)
    wait_for_a_checkpoint(config, launcher)
    ranks = list_children(launcher)
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    try:
        # This waits until no rank holds the pipe any more.
        output = launcher.communicate(timeout=DEADLINE_S)[0].decode()
        assert "SEMI-E002" in output
        deadline = time.monotonic() + DEADLINE_S
        while not all(has_ended(rank) for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(has_ended(rank) for rank in ranks)
    finally:
        for rank in ranks:
            if not has_ended(rank):
                os.kill(rank, signal.SIGKILL)
    moment = json.loads(storage.read_bytes(list_checkpoints(config)[-1]))["moment"]
    assert f"checkpoint after {moment['images_processed']:,} images" in output, "both ranks stop at the same step"
