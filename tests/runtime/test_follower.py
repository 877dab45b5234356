"""Test that the nodes of a TrainJob stop, after a checkpoint, when their run has ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.observability.task_status import announce_cancellation
from semiscale.runtime import follower
from semiscale.stages.train.config import TrainConfig
from tests.support.stages import Stages
from tests.support.trainings import list_checkpoints, training_config, wait_for_a_checkpoint

TIMEOUT_S = 2.0
# The stage of a node, with short times.
NODE = f"""
import runpy
from semiscale.runtime import follower
follower.HEARTBEAT_INTERVAL_S, follower.FOLLOWER_TIMEOUT_S = 0.1, {TIMEOUT_S}
runpy.run_module("semiscale.stages.train", run_name="__main__")
"""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return a training that takes hours."""
    stages = Stages(tmp_path)
    return training_config(stages, str(stages.workdir), images_processed=10_000_000, checkpoint_minutes=0.001)


def start_node(config: TrainConfig, followed: str = "1") -> subprocess.Popen[bytes]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    environment = {**os.environ, **({follower.FOLLOWED_ENV: followed} if followed else {})}
    command = [sys.executable, "-c", NODE, *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_node_trains_while_it_is_followed_and_stops_after_a_checkpoint_when_it_is_not(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "HEARTBEAT_INTERVAL_S", 0.1)
    with follower.send_heartbeats(config.folder(), "train"):
        node = start_node(config)
        wait_for_a_checkpoint(config, node)
        time.sleep(2 * TIMEOUT_S)
        assert node.poll() is None
    output = node.communicate(timeout=120)[0].decode()
    assert node.returncode == 128 + signal.SIGTERM, output
    assert "no task has followed this TrainJob" in output
    assert "SEMI-E002" in output
    assert list_checkpoints(config)


def test_a_node_stops_when_its_run_is_cancelled(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "HEARTBEAT_INTERVAL_S", 0.1)
    # The run was cancelled before, and submitted again.
    announce_cancellation(config.workdir, "trial")
    with follower.send_heartbeats(config.folder(), "train"):
        node = start_node(config)
        wait_for_a_checkpoint(config, node)
        time.sleep(1)
        assert node.poll() is None
        announce_cancellation(config.workdir, "trial")
        output = node.communicate(timeout=120)[0].decode()
    assert node.returncode == 128 + signal.SIGTERM, output
    assert "run trial was cancelled" in output


def test_a_training_outside_of_a_trainjob_needs_no_heartbeat(config: TrainConfig) -> None:
    node = start_node(config, followed="")
    wait_for_a_checkpoint(config, node)
    time.sleep(2 * TIMEOUT_S)
    assert node.poll() is None
    node.terminate()
    assert "has followed" not in node.communicate(timeout=120)[0].decode()


def test_a_store_that_does_not_answer_stops_no_node(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "HEARTBEAT_INTERVAL_S", 0.05)
    monkeypatch.setattr(follower, "FOLLOWER_TIMEOUT_S", 0.5)
    monkeypatch.setenv(follower.FOLLOWED_ENV, "1")
    stopped = threading.Event()
    monkeypatch.setattr(os, "kill", lambda *args: stopped.set())
    read, fails = storage.read_or_none, threading.Event()

    def read_or_fail(uri: str) -> bytes | None:
        if fails.is_set():
            raise OSError("the store does not answer")
        return read(uri)

    monkeypatch.setattr(storage, "read_or_none", read_or_fail)
    with follower.stop_when_abandoned(str(tmp_path), config, config.plan, "TrainJob"):
        fails.set()
        assert not stopped.wait(1.5)
        fails.clear()
        assert stopped.wait(30), "it answers again, and there is no heartbeat"
