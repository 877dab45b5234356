"""The ranks of a training whose launcher is killed: they stop too, in good order."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from components.shared import storage
from tests.stages import Stages
from tests.test_train_restart import config_of, start, vouchers, wait_for_a_checkpoint

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")
DEADLINE_S = 300


def stat(process: int) -> list[str]:
    """Return what the kernel says of a process from its state on; of one that is gone, what it says of the dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that a process started."""
    known = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [one for one in known if stat(one)[1] == str(process.pid)]


def ended(process: int) -> bool:
    """Say whether a process is over: gone, or waiting for somebody to ask how it went."""
    return stat(process)[0] in "XZ"


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
        assert "told to stop; what was finished is kept" in said
        deadline = time.monotonic() + DEADLINE_S
        while not all(ended(rank) for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(ended(rank) for rank in ranks)
    finally:
        for rank in ranks:
            if not ended(rank):
                os.kill(rank, signal.SIGKILL)
    moment = json.loads(storage.read(vouchers(config)[-1]))["moment"]
    assert f"checkpoint after {moment['images_processed']:,} images" in said, "both at the same step"
