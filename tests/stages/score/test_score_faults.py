"""Test that disturbed pods write the scores of an undisturbed run.

Pods are killed, stopped, hung and raced. They are real processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.stages.score import stage
from semiscale.stages.score.config import ScoreConfig
from semiscale.storage import leases
from semiscale.storage.leases import LeaseManager
from tests.support import sample_images
from tests.support.proxies import serve_delayed
from tests.support.stages import Stages


def stages_of(root: Path, shards: int, per_shard: int) -> Stages:
    """Return a run with a larger pool and a trained teacher."""
    stages = Stages(root, unlabeled=[str(sample_images.write_pool(root / "large", shards, per_shard))])
    assert stages.teacher
    return stages


def config_of(stages: Stages, workdir: Path, pod: int = 0) -> ScoreConfig:
    """Return the config of a pod that scores the planned pool into another workdir."""
    return ScoreConfig(
        workdir=str(workdir),
        plan=stages.uri(stages.plan),
        teacher=stages.uri(stages.teacher),
        pod=pod,
        images_per_class=12,
    )


def start(config: ScoreConfig, program: str = "", **environment: str) -> subprocess.Popen[bytes]:
    """Start a pod as a process, or a program that runs a pod with other settings."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    command = [sys.executable, *(["-c", program] if program else ["-m", "semiscale.stages.score"]), *options]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def scores_in(workdir: Path) -> dict[str, bytes]:
    """Return the files of all finished shard groups by their path in the workdir."""
    folders = [path.parent for path in workdir.rglob("receipt.json")]
    files = sorted(file for folder in folders for file in folder.glob("*.parquet"))
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}


def count_results(workdir: Path) -> int:
    """Return the number of scored shards and finished shard groups."""
    return len(list(workdir.rglob("parts/*.parquet"))) + len(list(workdir.rglob("receipt.json")))


def wait_for_a_result(workdir: Path, more_than: int, pods: list[subprocess.Popen[bytes]]) -> None:
    """Wait until there are more results than a number, or the pods have ended."""
    while count_results(workdir) <= more_than and any(pod.poll() is None for pod in pods):
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_pods_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    stages = stages_of(tmp_path, shards=4 * kills, per_shard=64)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    stage.score(config_of(stages, undisturbed))
    moments = random.Random(kills)
    for _ in range(kills):
        pods = [start(config_of(stages, disturbed, pod)) for pod in (0, 1)]
        wait_for_a_result(disturbed, count_results(disturbed), pods)
        time.sleep(moments.random() * 0.2)
        for pod in pods:
            pod.send_signal(signal.SIGKILL)
            pod.communicate()
        # Expire the leases of the dead pods, which last two minutes.
        for lease in disturbed.rglob("claims/*/*"):
            lease.write_text(json.dumps({"holder": "dead", "until": 0}))
    stage.score(config_of(stages, disturbed))
    assert scores_in(disturbed) == scores_in(undisturbed)
    assert len(list(disturbed.rglob("receipt.json"))) > 1, "there are several shard groups"


def test_two_pods_at_once_share_the_work(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, shards=12, per_shard=256)
    workdir = tmp_path / "both"
    pods = [start(config_of(stages, workdir, pod)) for pod in (0, 1)]
    outputs = [pod.communicate()[0].decode() for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    logs = "".join(outputs)
    for number in range(12):
        assert logs.count(f"pool-{number:03}.tar: 256 images scored") == 1


def test_a_pod_releases_its_leases_at_sigterm(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, shards=8, per_shard=512)
    workdir = tmp_path / "stopped"
    pod = start(config_of(stages, workdir))
    wait_for_a_result(workdir, 0, [pod])
    pod.send_signal(signal.SIGTERM)
    output = pod.communicate(timeout=300)[0].decode()
    assert pod.returncode == 128 + signal.SIGTERM, output
    assert "SEMI-E002" in output
    assert not list(workdir.rglob("claims/*/*"))
    done = stage.score(config_of(stages, workdir))
    assert done.scored == 8 * 512


def abandon_lease(manager: LeaseManager, work: str) -> str | None:
    """Create a lease that nobody renews or deletes, as a killed pod leaves it. Return None if another one is valid."""
    uri = manager._next(work)
    return uri if uri and manager._create(uri) else None


def test_a_lease_has_one_holder_until_it_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, yours = LeaseManager(str(tmp_path)), LeaseManager(str(tmp_path))
    with mine.lease("u") as first, yours.lease("u") as second:
        assert (first, second) == (True, False)
    with yours.lease("u") as later:
        assert later
    hung = abandon_lease(LeaseManager(str(tmp_path)), "hung")
    assert hung is not None
    assert abandon_lease(yours, "hung") is None
    later_s = time.time() + leases.LEASE_DURATION_S
    monkeypatch.setattr(time, "time", lambda: later_s)
    assert abandon_lease(yours, "hung") is not None


def test_a_lease_by_a_fast_clock_expires_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_DURATION_S", 0.2)
    uri = abandon_lease(LeaseManager(str(tmp_path)), "u")
    assert uri is not None
    storage.write_bytes(uri, json.dumps({"holder": "dead", "until": time.time() + 86_400}).encode())
    mine = LeaseManager(str(tmp_path))
    assert mine.active() == {"u"}
    assert abandon_lease(mine, "u") is None
    time.sleep(0.25)
    assert mine.active() == set()
    assert abandon_lease(mine, "u") is not None


def test_a_lease_is_renewed_while_its_holder_makes_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine may stop every thread for half of this time.
    monkeypatch.setattr(leases, "LEASE_DURATION_S", 1.0)
    monkeypatch.setattr(leases, "RENEW_INTERVAL_S", 0.05)
    monkeypatch.setattr(leases, "STALL_TIMEOUT_S", 0.4)
    working = LeaseManager(str(tmp_path))
    with working.lease("u"):
        for _ in range(13):
            time.sleep(0.1)
            working.heartbeat()
        assert abandon_lease(LeaseManager(str(tmp_path)), "u") is None
        deadline = time.monotonic() + 60
        while abandon_lease(LeaseManager(str(tmp_path)), "u") is None:
            assert time.monotonic() < deadline, "a holder without progress loses its lease"
            time.sleep(0.05)


SHORT_LEASES = """
import sys
from semiscale import storage
from semiscale.runtime import shared_work
from semiscale.stages.score import stage
from semiscale.storage import leases
leases.LEASE_DURATION_S, leases.RENEW_INTERVAL_S, leases.STALL_TIMEOUT_S = 1.0, 0.1, 1.0
shared_work.POLL_INTERVAL_S = 0.2
from semiscale.runtime.entrypoints import run_from_cli
sys.exit(run_from_cli(stage.ScoreConfig, stage.score))
"""


@pytest.mark.slow
def test_a_hung_pod_loses_its_shards_and_changes_nothing_when_it_resumes(
    tmp_path: Path, gs_server: str, gs_bucket: str
) -> None:
    # The store of the first pod stops answering, and the second pod is frozen. The third pod does all of their work.
    for path in sample_images.write_pool(tmp_path / "large", 24, 64).iterdir():
        storage.upload(path, f"{gs_bucket}/pool/{path.name}")
    stages = Stages(tmp_path, unlabeled=[f"{gs_bucket}/pool"], pods=3)
    stage.score(config_of(stages, tmp_path / "undisturbed"))
    workdir = tmp_path / "disturbed"
    with serve_delayed(gs_server, latency_s=0.02) as relay:
        reading, frozen = (
            start(config_of(stages, workdir, pod), SHORT_LEASES, STORAGE_EMULATOR_HOST=relay.address) for pod in (0, 1)
        )
        wait_for_a_result(workdir, 0, [reading, frozen])
        relay.stall()
        frozen.send_signal(signal.SIGSTOP)
        assert list(workdir.rglob("claims/*/*"))
        third = start(config_of(stages, workdir, 2), SHORT_LEASES)
        output = third.communicate(timeout=300)[0].decode()
        assert third.returncode == 0, output
        receipts = {path: path.read_bytes() for path in workdir.rglob("receipt.json")}
        assert reading.poll() is None
        relay.resume()
        frozen.send_signal(signal.SIGCONT)
        outputs = [pod.communicate(timeout=300)[0].decode() for pod in (reading, frozen)]
        assert [pod.returncode for pod in (reading, frozen)] == [0, 0], outputs
    assert scores_in(workdir) == scores_in(tmp_path / "undisturbed")
    assert {path: path.read_bytes() for path in workdir.rglob("receipt.json")} == receipts


def test_active_leases_cost_one_listing_and_one_read_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_DURATION_S", 2.0)
    monkeypatch.setattr(leases, "RENEW_INTERVAL_S", 0.1)
    read_uris: list[str] = []
    read = storage.read_or_none

    def record_read(uri: str) -> bytes | None:
        read_uris.append(uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_or_none", record_read)
    mine, yours = LeaseManager(str(tmp_path)), LeaseManager(str(tmp_path))
    # Threads of earlier tests may end meanwhile.
    before = set(threading.enumerate())
    with mine.lease("a"), mine.lease("b"):
        assert len(set(threading.enumerate()) - before) == 1, "one thread renews both"
        assert abandon_lease(yours, "dead") is not None
        for _ in range(25):
            assert yours.active() >= {"a", "b"}
            time.sleep(0.1)
        assert yours.active() == {"a", "b"}, "renewed leases stay, and the other one expires"
        assert len([uri for uri in read_uris if "/claims/" in uri]) == 3, "each lease is read once"
    assert yours.active() == set()


def test_a_lease_is_held_if_the_answer_to_its_creation_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the retry of a client that got no answer.

    The second write finds the object of the first.
    """
    write = storage.write_bytes

    def write_twice(uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        write(uri, data, if_absent=if_absent)
        return write(uri, data, if_absent=if_absent)

    monkeypatch.setattr(storage, "write_bytes", write_twice)
    with LeaseManager(str(tmp_path)).lease("u") as mine, LeaseManager(str(tmp_path)).lease("u") as yours:
        assert (mine, yours) == (True, False)


RACE = """
import sys, time
from contextlib import ExitStack
from semiscale.storage.leases import LeaseManager
leases = LeaseManager(sys.argv[1])
print("ready", flush=True)
start = float(input())
with ExitStack() as stack:
    for turn in range(20):
        time.sleep(max(start + turn / 10 - time.time(), 0))
        print(int(stack.enter_context(leases.lease(f"shard-{turn}"))), end=" ")
    print(flush=True)
    # Hold the leases until every process has tried.
    sys.stdin.read()
"""


def test_one_of_many_processes_gets_a_lease(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(12)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    start = f"{time.time() + 0.5}\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(start)
        racer.stdin.flush()
    results = [racer.stdout.readline().split() for racer in racers if racer.stdout]
    for racer in racers:
        racer.communicate()
    assert [sum(map(int, turn)) for turn in zip(*results, strict=True)] == [1] * 20


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_shard_that_disappeared_or_changed_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    stages = stages_of(tmp_path, shards=2, per_shard=8)
    victim = tmp_path / "large" / "pool-001.tar"
    if damage == "gone":
        victim.unlink()
    else:
        sample_images.write_tar(victim, {"new.png": sample_images.draw_png(0, 1)})
    with pytest.raises((SemiscaleError, FileNotFoundError), match=r"pool-001\.tar"):
        stage.score(config_of(stages, tmp_path / "work2"))


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Check that scores are equal to the bit if shards have other sizes.

    The images are then in other batches and at other positions of a batch.
    """
    scores = []
    for per_shard in (1, 7, 64, 200):
        root = tmp_path / str(per_shard)
        pool = sample_images.write_pool(root / "pool", -(-200 // per_shard), per_shard)
        stages = Stages(root, unlabeled=[str(pool)], images_per_class=1000, classes_per_image=3)
        rows = stages.selection_rows()
        scores.append({(row["key"], row["class"]): row["score"] for row in rows if int(row["key"]) < 200})
    assert len(scores[0]) == 600
    assert scores[0] == scores[1] == scores[2] == scores[3]
