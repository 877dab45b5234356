"""The ranks of a training that is told to stop by one of them, or whose launcher is killed: all stop in good order."""

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
from tests.support.processes import ended, stat
from tests.support.stages import Stages
from tests.support.trainings import config_of, run_logged, start, vouchers, wait_for_a_checkpoint

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")
DEADLINE_S = 300


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that a process started."""
    known = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [one for one in known if stat(one)[1] == str(process.pid)]


def logged(root: Path, **moments: int) -> tuple[TrainConfig, str]:
    """Train for 40 steps by two ranks that log their keys, and to which something happens; return what they said."""
    config = config_of(Stages(root), str(root / "work"), images_processed=200, checkpoint_minutes=10)
    return config, run_logged(config, 1 << 30, root / "keys", *LAUNCHER, **moments).stdout.decode()


@pytest.mark.slow
def test_a_rank_that_is_told_to_stop_ends_the_validation_of_another(tmp_path: Path) -> None:
    """Rank 0 validates, and SIGTERM comes to rank 1 alone, as where its node is drained: it is not made to wait."""
    config, said = logged(tmp_path, told_in=3)
    assert said.count("failed: SIGTERM: the process was stopped") == 2, said
    assert "exitcode  : 143" in said, said
    assert [path.read_text() for path in (tmp_path / "keys").glob("stopped-*")] == ["1", "1"], "not before it is saved"
    (uri,) = vouchers(config)
    moment = json.loads(storage.read_bytes(uri))["moment"]
    assert moment["step"] == 12, "the third of ten validations, of 40 steps"
    last = moment["curve"][-1]
    assert (last["images_processed"], last["validation_top1"]) == (60, None), "which was not made"
    receipt = train(config)
    assert [point.images_processed for point in receipt.curve] == list(range(5, 201, 5))
    validated = [point.images_processed for point in receipt.curve if point.validation_top1 is not None]
    assert validated == list(range(20, 201, 20))


@pytest.mark.slow
def test_the_rank_whose_loss_broke_first_says_so(tmp_path: Path) -> None:
    """Its gradient breaks the weights of all: the next loss of rank 0 is no number either, of images that are fine."""
    _, said = logged(tmp_path, broken_at=7)
    lines = [json.loads((tmp_path / "keys" / f"{rank}.jsonl").read_text().splitlines()[6]) for rank in (0, 1)]
    assert [line["step"] for line in lines] == [7, 7]
    assert "the loss is nan after 35 images (step 7, learning rate 0.00390625)" in said
    assert f"at the batch: {', '.join(lines[1]['keys'])} [SEMI-E233]\n" in said
    assert "The loss of step 7 on another rank is not finite. See that rank's log. [SEMI-E234]\n" in said
    assert said.count("failed: train:") == 2
    assert "Connection closed" not in said


@pytest.mark.slow
def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    config = config_of(stages, str(tmp_path / "work"), images_processed=500_000)  # hours
    launcher = start(config, *LAUNCHER)
    wait_for_a_checkpoint(config, launcher)
    ranks = children(launcher)
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    try:
        said = launcher.communicate(timeout=DEADLINE_S)[0].decode()  # until no rank holds the pipe any more
        assert "SEMI-E002" in said
        deadline = time.monotonic() + DEADLINE_S
        while not all(ended(rank) for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(ended(rank) for rank in ranks)
    finally:
        for rank in ranks:
            if not ended(rank):
                os.kill(rank, signal.SIGKILL)
    moment = json.loads(storage.read_bytes(vouchers(config)[-1]))["moment"]
    assert f"checkpoint after {moment['images_processed']:,} images" in said, "both at the same step"
