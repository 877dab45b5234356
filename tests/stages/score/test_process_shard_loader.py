"""The feed in processes of its own: the batches of the one in this process, and nothing left of it, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from semiscale.common.errors import SemiscaleError
from semiscale.data import listing
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, Shard
from semiscale.stages.score import process_shard_loader, stage
from semiscale.stages.score.process_shard_loader import ProcessShardLoader
from semiscale.stages.score.shard_loader import DecodedBatch, SampleInfo, ShardLoader
from tests.stages.score.test_score_faults import config_of, scores_in, start, wait_for_a_part
from tests.support import pictures
from tests.support.processes import besides, ended
from tests.support.stages import Stages

TINY = Preprocessing(resolution=16, augmentation="shift")
BATCH = 7

# A pod on this machine's CPU that decodes in two processes, as one with a GPU does.
POD = """
import runpy
from semiscale.stages.score import process_shard_loader, scanner, scorer

process_shard_loader.available_cpus, process_shard_loader.CPUS_PER_PROCESS = lambda: 2, 1
scanner._feed = lambda device, preprocessing, columns, decodes_on_gpu: process_shard_loader.ProcessShardLoader(
    preprocessing, columns, *scorer.batch_size_and_depth(device, preprocessing)
)
runpy.run_module("semiscale.stages.score", run_name="__main__")
"""


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_shard_loader, "available_cpus", lambda: 2)
    monkeypatch.setattr(process_shard_loader, "CPUS_PER_PROCESS", 1)


def pool_of(root: Path) -> list[Shard]:
    """Five tars, with images that are none, and loose files."""
    pictures.write_pool(root / "pool", 4, 25)
    pictures.write_tar(root / "pool" / "odd.tar", {"a.png": pictures.picture(0, 1), "b.png": b"no image", "c.png": b""})
    return listing.list_shards([str(root / "pool")])


def found_in(
    batches: Iterator[DecodedBatch], give_back: "ShardLoader | ProcessShardLoader"
) -> dict[tuple[str, str], tuple[SampleInfo, bytes]]:
    """What each sample of each shard was, without its seconds, and its pixels; every shard must end once, whole."""
    found: dict[tuple[str, str], tuple[SampleInfo, bytes]] = {}
    listed: dict[str, int] = {}
    for batch in batches:
        for span in batch.spans:
            for one, image_HWC in zip(span.seen, batch.images_BHWC[span.slice], strict=True):
                pixels = b"" if one.problem else image_HWC.tobytes()
                assert found.setdefault((span.shard.name, one.key), (one._replace(seconds=0.0), pixels))[1] == pixels
            if span.ends:
                assert span.shard.name not in listed
                listed[span.shard.name] = span.listed
        give_back.release(batch.slot)
    assert sum(listed.values()) == len(found)
    return found


def feed_of_this_process() -> ShardLoader:
    return ShardLoader(TINY, SampleFields(), np.zeros((6, BATCH, 16, 16, 3), np.uint8), 2, 2)


def test_processes_decode_what_this_one_does_again_and_again(tmp_path: Path, two_processes: None) -> None:
    pool = pool_of(tmp_path)
    here, there = feed_of_this_process(), ProcessShardLoader(TINY, SampleFields(), BATCH, 2)
    expected = found_in(here.batches(pool), here)
    assert len(expected) == 103
    assert {one.problem for one, _ in expected.values()} == {"", "not an image", "empty file"}
    assert found_in(there.batches(iter(pool)), there) == expected
    assert found_in(there.batches(iter(pool[:1])), there).items() <= expected.items()
    assert not list(there.batches([]))


def test_what_ends_a_feed_is_raised_after_what_it_had(tmp_path: Path, two_processes: None) -> None:
    pool = pool_of(tmp_path)

    def breaking() -> Iterator[Shard]:
        yield from pool[:3]
        raise OSError("the store does not answer")

    there = ProcessShardLoader(TINY, SampleFields(), BATCH, 2)
    ended: list[str] = []

    def take_all() -> None:
        for batch in there.batches(breaking()):
            ended.extend(span.shard.name for span in batch.spans if span.ends)
            there.release(batch.slot)

    with pytest.raises(OSError, match="the store does not answer"):
        take_all()
    assert sorted(ended) == sorted(shard.name for shard in pool[:3])
    Path(pool[1].uri).unlink()
    with pytest.raises(SemiscaleError, match=rf"{pool[1].uri}: .*SEMI-E272"):
        found_in(there.batches(iter(pool)), there)


def test_a_process_that_is_lost_is_named(tmp_path: Path, two_processes: None) -> None:
    pool = pool_of(tmp_path)
    there = ProcessShardLoader(TINY, SampleFields(), BATCH, 2)
    batches = there.batches(iter(pool))
    next(batches)  # and keep it
    victims = besides(os.getpid())
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    with pytest.raises(SemiscaleError, match="the process that reads and decodes images .*exit code -9.*SEMI-E004"):
        list(batches)
    assert len(victims) == 2
    assert all(ended(victim) for victim in victims)


def test_who_stops_taking_batches_leaves_no_process(tmp_path: Path, two_processes: None) -> None:
    there = ProcessShardLoader(TINY, SampleFields(), BATCH, 2)
    batches = there.batches(iter(pool_of(tmp_path)))
    next(batches)
    processes = besides(os.getpid())
    assert len(processes) == 2
    batches.close()
    assert all(ended(process) for process in processes)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_pod_that_decodes_in_processes_ends_with_them_and_goes_on_to_the_same_scores(
    tmp_path: Path, ending: signal.Signals
) -> None:
    """SIGTERM to the whole group, as a service manager sends it: the pod says when its processes stop."""
    stages = Stages(tmp_path, unlabeled=[str(pictures.write_pool(tmp_path / "large", 16, 64))])
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    stage.score(config_of(stages, undisturbed))
    pod = start(config_of(stages, disturbed), POD)
    wait_for_a_part(disturbed, 0, [pod])
    processes = besides(pod.pid)
    assert len(processes) == 2
    if ending == signal.SIGTERM:
        for process in processes:
            os.kill(process, ending)
    pod.send_signal(ending)
    output = pod.communicate(timeout=60)[0].decode()
    assert pod.returncode == (-ending if ending == signal.SIGKILL else 143), output
    assert "lost" not in output
    until = time.monotonic() + 20
    while not all(ended(process) for process in processes):
        assert time.monotonic() < until
        time.sleep(0.05)
    for claim in disturbed.rglob("claims/*/*"):  # the dead pod's leases are over
        claim.write_text(json.dumps({"holder": "dead", "until": 0}))
    stage.score(config_of(stages, disturbed))
    assert scores_in(disturbed) == scores_in(undisturbed)


def test_an_error_that_cannot_be_sent_is_sent_in_words() -> None:
    program = """
from semiscale.common.worker_process import WorkerProcess
from tests.stages.score.test_process_shard_loader import fail

beside = WorkerProcess("fails", fail)
try:
    beside.receive()
except RuntimeError as error:
    print(error)
beside.close()
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "Traceback" in printed
    assert "OddError: 1 and 2" in printed


class OddError(Exception):
    """An error as libraries have them: pickle cannot make it again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail(line: object) -> None:
    """Raise what cannot be sent."""
    raise OddError(1, 2)
