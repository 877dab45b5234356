"""Test that worker processes load the same samples as this process.

None of them may remain, however a scan ends.
"""

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
from semiscale.stages.score.thread_shard_loader import ThreadShardLoader
from tests.stages.score.test_score_faults import config_of, scores_in, start, wait_for_a_result
from tests.support import sample_images
from tests.support.processes import has_ended, worker_processes
from tests.support.stages import Stages

TINY = Preprocessing(resolution=16, augmentation="shift")
BATCH_SIZE = 7

# A pod that scores on a CPU, and decodes in two worker processes as a pod with a GPU does.
POD = """
import runpy
from semiscale.stages.score import process_shard_loader, scanner, scorer

process_shard_loader.available_cpus, process_shard_loader.CPUS_PER_PROCESS = lambda: 2, 1
scanner._make_loader = lambda device, preprocessing, columns, decodes_on_gpu: process_shard_loader.ProcessShardLoader(
    preprocessing, columns, *scorer.batch_size_and_depth(device, preprocessing)
)
runpy.run_module("semiscale.stages.score", run_name="__main__")
"""


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_shard_loader, "available_cpus", lambda: 2)
    monkeypatch.setattr(process_shard_loader, "CPUS_PER_PROCESS", 1)


def write_odd_pool(root: Path) -> list[Shard]:
    """Write five tars. One of them has two files that are no images."""
    sample_images.write_pool(root / "pool", 4, 25)
    sample_images.write_tar(
        root / "pool" / "odd.tar", {"a.png": sample_images.draw_png(0, 1), "b.png": b"no image", "c.png": b""}
    )
    return listing.list_shards([str(root / "pool")])


def collect_samples(
    batches: Iterator[DecodedBatch], loader: ShardLoader
) -> dict[tuple[str, str], tuple[SampleInfo, bytes]]:
    """Return every sample by shard and key, without its seconds, and its pixels.

    Every shard must end once, and be complete.
    """
    samples: dict[tuple[str, str], tuple[SampleInfo, bytes]] = {}
    listed: dict[str, int] = {}
    for batch in batches:
        for span in batch.spans:
            for sample, image_HWC in zip(span.samples, batch.images_BHWC[span.slice], strict=True):
                pixels = b"" if sample.problem else image_HWC.tobytes()
                key = span.shard.name, sample.key
                assert samples.setdefault(key, (sample._replace(seconds=0.0), pixels))[1] == pixels
            if span.is_last:
                assert span.shard.name not in listed
                listed[span.shard.name] = span.listed
        loader.release(batch.slot)
    assert sum(listed.values()) == len(samples)
    return samples


def make_local_loader() -> ThreadShardLoader:
    return ThreadShardLoader(TINY, SampleFields(), np.zeros((6, BATCH_SIZE, 16, 16, 3), np.uint8), 2, 2)


def test_worker_processes_decode_the_same_as_this_process_in_every_scan(tmp_path: Path, two_processes: None) -> None:
    pool = write_odd_pool(tmp_path)
    local, remote = make_local_loader(), ProcessShardLoader(TINY, SampleFields(), BATCH_SIZE, 2)
    expected = collect_samples(local.batches(pool), local)
    assert len(expected) == 103
    assert {sample.problem for sample, _ in expected.values()} == {"", "not an image", "empty file"}
    assert collect_samples(remote.batches(iter(pool)), remote) == expected
    assert collect_samples(remote.batches(iter(pool[:1])), remote).items() <= expected.items()
    assert not list(remote.batches([]))


def test_an_error_of_the_shards_is_raised_after_their_batches(tmp_path: Path, two_processes: None) -> None:
    pool = write_odd_pool(tmp_path)

    def fail_after_three() -> Iterator[Shard]:
        yield from pool[:3]
        raise OSError("the store does not answer")

    remote = ProcessShardLoader(TINY, SampleFields(), BATCH_SIZE, 2)
    finished: list[str] = []

    def take_all() -> None:
        for batch in remote.batches(fail_after_three()):
            finished.extend(span.shard.name for span in batch.spans if span.is_last)
            remote.release(batch.slot)

    with pytest.raises(OSError, match="the store does not answer"):
        take_all()
    assert sorted(finished) == sorted(shard.name for shard in pool[:3])
    Path(pool[1].uri).unlink()
    with pytest.raises(SemiscaleError, match=rf"{pool[1].uri}: .*SEMI-E272"):
        collect_samples(remote.batches(iter(pool)), remote)


def test_the_error_names_a_lost_process(tmp_path: Path, two_processes: None) -> None:
    pool = write_odd_pool(tmp_path)
    remote = ProcessShardLoader(TINY, SampleFields(), BATCH_SIZE, 2)
    batches = remote.batches(iter(pool))
    # The batch is not released.
    next(batches)
    victims = worker_processes(os.getpid())
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    with pytest.raises(SemiscaleError, match="the process that reads and decodes images .*exit code -9.*SEMI-E004"):
        list(batches)
    assert len(victims) == 2
    assert all(has_ended(victim) for victim in victims)


def test_closing_the_iterator_ends_the_processes(tmp_path: Path, two_processes: None) -> None:
    remote = ProcessShardLoader(TINY, SampleFields(), BATCH_SIZE, 2)
    batches = remote.batches(iter(write_odd_pool(tmp_path)))
    next(batches)
    processes = worker_processes(os.getpid())
    assert len(processes) == 2
    batches.close()
    assert all(has_ended(process) for process in processes)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_pod_ends_its_processes_and_resumes_to_the_same_scores(tmp_path: Path, ending: signal.Signals) -> None:
    """Check both signals.

    A service manager sends SIGTERM to the whole process group. The worker processes ignore it, and the pod ends them.
    """
    stages = Stages(tmp_path, unlabeled=[str(sample_images.write_pool(tmp_path / "large", 16, 64))])
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    stage.score(config_of(stages, undisturbed))
    pod = start(config_of(stages, disturbed), POD)
    wait_for_a_result(disturbed, 0, [pod])
    processes = worker_processes(pod.pid)
    assert len(processes) == 2
    if ending == signal.SIGTERM:
        for process in processes:
            os.kill(process, ending)
    pod.send_signal(ending)
    output = pod.communicate(timeout=60)[0].decode()
    assert pod.returncode == (-ending if ending == signal.SIGKILL else 143), output
    assert "lost" not in output
    deadline = time.monotonic() + 20
    while not all(has_ended(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Expire the leases of the dead pod.
    for lease in disturbed.rglob("claims/*/*"):
        lease.write_text(json.dumps({"holder": "dead", "until": 0}))
    stage.score(config_of(stages, disturbed))
    assert scores_in(disturbed) == scores_in(undisturbed)


def test_an_error_that_cannot_be_pickled_is_sent_as_text() -> None:
    program = """
from semiscale.common.worker_process import WorkerProcess
from tests.stages.score.test_process_shard_loader import fail

worker = WorkerProcess("fails", fail)
try:
    worker.receive()
except RuntimeError as error:
    print(error)
worker.close()
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "Traceback" in printed
    assert "OddError: 1 and 2" in printed


class OddError(Exception):
    """Error that pickle cannot restore, as some libraries have them."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail(channel: object) -> None:
    """Raise an error that cannot be pickled."""
    raise OddError(1, 2)
