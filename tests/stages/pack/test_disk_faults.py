"""Scoring, merging and packing on full disks, merging and packing processes that are killed: the bytes are those of an
undisturbed run. Scoring pods that are killed: test_score_faults.py.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semiscale.receipts.score import ShardGroupReceipt
from semiscale.runtime.stage_config import StageConfig
from semiscale.stages.merge.stage import MergeConfig, merge
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.stage import pack
from semiscale.stages.score import shard_scores
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.stage import score
from tests.support import pictures, selections
from tests.support.stages import Stages


def start(config: StageConfig, largest_bytes: int = -1) -> subprocess.Popen[str]:
    """Start a stage as a process of its own, which can write no larger file."""
    fields = config.model_dump(exclude_defaults=True)
    options = [
        f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, list) else value}"
        for name, value in fields.items()
    ]
    command = [sys.executable, "-m", f"semiscale.stages.{config.stage}", *options]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, largest_bytes))

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ), preexec_fn=limit
    )


def products(workdir: Path) -> dict[str, bytes]:
    """What a stage left, by its place in the workdir: receipts and parts, which tell the time, and claims apart."""
    return {
        str(path.relative_to(workdir)): path.read_bytes().replace(str(workdir).encode(), b"")
        for path in sorted((workdir / "stages").rglob("*"))
        if path.is_file() and path.name != "receipt.json" and not {"claims", "settled", "parts"} & set(path.parts)
    }


def ledger(workdir: Path) -> list[str]:
    """What the receipts of scored units say, without the time it took and the place."""
    receipts = [
        ShardGroupReceipt.model_validate_json(path.read_text().replace(str(workdir), ""))
        for path in sorted(workdir.glob("stages/score/*/*/receipt.json"))
    ]
    return [
        receipt.model_dump_json(
            exclude={"seconds": True, "clocks": True, "slowest": True, "shards": {"__all__": {"clocks"}}}
        )
        for receipt in receipts
    ]


def scored_shards(workdir: Path) -> dict[str, bytes]:
    """The parts that scoring left, by name. Raises where one is not whole."""
    found = {path: path.read_bytes() for path in workdir.glob("stages/score/*/parts/*")}
    for path, data in found.items():
        teacher = path.parts[-3].partition("-")[0]
        assert shard_scores.shard_scores_from_parquet(data, path.name, teacher).count.scored == 100
    return {path.name: data for path, data in found.items()}


def whole(workdir: Path) -> int:
    """Count what is finished, by its name."""
    return sum(not path.name.startswith(".") for path in (workdir / "stages").rglob("*.*"))


def pack_config(root: Path, workdir: Path, pod: int = 0) -> PackConfig:
    """The packing of a selection: 80 small tars out of Parquet files and tars, with excerpts on the way."""
    if not (root / "selection.json").exists():
        pictures.write_pool(root / "pool", 4, 100)
        for number in range(4):
            pictures.write_parquet(root / "pool" / f"{number}.parquet", 33, seed=5000 + 100 * number)
        selections.write(root, str(root / "pool"), per_class=250)
    plan, selection = str(root / "plan.json"), str(root / "selection.json")
    return PackConfig(workdir=str(workdir), plan=plan, selection=selection, pod=pod, packed_tar_bytes=2000)


def merge_config(stages: Stages, workdir: Path) -> MergeConfig:
    """The merging of a scored pool, in a workdir of its own."""
    scores = [stages.uri(receipt) for receipt in stages.scores]
    return MergeConfig(
        workdir=str(workdir), plan=stages.uri(stages.plan), scores=scores, images_per_class=300,
        classes_per_image=2, max_failed_fraction=0.0,
    )  # fmt: skip


def void_claims(workdir: Path) -> None:
    """The dead pods' leases, two minutes long, are over."""
    for claim in workdir.rglob("claims/**/0*"):
        if claim.is_file():
            claim.write_text(json.dumps({"holder": "dead", "until": 0}))


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_packing_pods_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    pack(pack_config(tmp_path, undisturbed))
    moments = random.Random(kills)
    for _ in range(kills):
        before = whole(disturbed)
        pods = [start(pack_config(tmp_path, disturbed, pod)) for pod in (0, 1)]
        while whole(disturbed) <= before and any(pod.poll() is None for pod in pods):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        for pod in pods:
            pod.send_signal(signal.SIGKILL)
            pod.communicate()
        void_claims(disturbed)
    assert not list(disturbed.rglob("receipt.json")) or kills > 3, "the pods were killed at their work"
    pack(pack_config(tmp_path, disturbed))
    found = {name: data for name, data in products(disturbed).items() if "/.writing-" not in name}
    assert found == products(undisturbed)
    assert len(found) > 70


def test_a_packing_pod_that_is_told_to_stop_gives_its_claim_back(tmp_path: Path) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    pack(pack_config(tmp_path, undisturbed))
    pod = start(pack_config(tmp_path, stopped))
    while whole(stopped) < 5 and pod.poll() is None:
        time.sleep(0.001)
    pod.send_signal(signal.SIGTERM)
    _, error = pod.communicate(timeout=60)
    assert pod.returncode == 128 + signal.SIGTERM
    assert "SEMI-E002" in error
    assert error.count("\n") == 1
    assert not [path for path in stopped.rglob("claims/**/0*") if path.is_file()]
    assert not list(stopped.rglob("receipt.json"))
    pack(pack_config(tmp_path, stopped))
    assert products(stopped) == products(undisturbed)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A scored pool."""
    root = tmp_path_factory.mktemp("scored")
    stages = Stages(root, unlabeled=[str(pictures.write_pool(root / "large", 8, 100))])
    assert stages.scores
    return stages


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_merges_killed_at_random_moments(scored: Stages, tmp_path: Path, kills: int) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    merge(merge_config(scored, undisturbed))
    moments = random.Random(kills)
    for _ in range(kills):
        process = start(merge_config(scored, disturbed))
        while not (disturbed / "stages").exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(moments.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in disturbed.rglob("selection.parquet"):
            assert path.read_bytes() in products(undisturbed).values(), "what has its name is whole"
    merge(merge_config(scored, disturbed))
    assert {name: data for name, data in products(disturbed).items() if "/.writing-" not in name} == products(
        undisturbed
    )


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Mount a file system of so many bytes; skips the test where we may not."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("stage", "size_bytes"), [("pack", 128 << 10), ("merge", 16 << 10), ("score", 56 << 10)])
def test_a_full_disk_stops_a_stage_in_one_line(scored: Stages, tmp_path: Path, stage: str, size_bytes: int) -> None:
    space, disk = tmp_path / "space", tmp_path / "disk"
    work(config_of(stage, scored, tmp_path, space))
    with small_disk(disk, size_bytes):
        check_stopped(
            start(config_of(stage, scored, tmp_path, disk)), "[Errno 28] No space left on device", disk, space
        )
        kept = scored_shards(disk)
        assert stage != "score" or 0 < len(kept) < 8
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        check_goes_on(config_of(stage, scored, tmp_path, disk), kept, space)


@pytest.mark.parametrize("stage", ["pack", "merge", "score"])
def test_a_file_that_cannot_be_finished_stops_a_stage_in_one_line(scored: Stages, tmp_path: Path, stage: str) -> None:
    space, quota = tmp_path / "space", tmp_path / "quota"
    work(config_of(stage, scored, tmp_path, space))
    process = start(config_of(stage, scored, tmp_path, quota), largest_bytes=8 << 10)
    check_stopped(process, "[Errno 27] File too large", quota, space)
    kept = scored_shards(quota)
    assert len(kept) == (8 if stage == "score" else 0), "a shard's scores are smaller than that, a unit's are not"
    check_goes_on(config_of(stage, scored, tmp_path, quota), kept, space)


def config_of(stage: str, scored: Stages, root: Path, workdir: Path) -> StageConfig:
    """Any stage's config."""
    if stage == "pack":
        return pack_config(root, workdir)
    if stage == "merge":
        return merge_config(scored, workdir)
    plan, teacher = scored.uri(scored.plan), scored.uri(scored.teacher)
    return ScoreConfig(workdir=str(workdir), plan=plan, teacher=teacher, pod=0, images_per_class=12)


def work(config: StageConfig) -> None:
    """Run a stage in this process."""
    match config:
        case PackConfig():
            pack(config)
        case MergeConfig():
            merge(config)
        case ScoreConfig():
            score(config)


def check_stopped(process: subprocess.Popen[str], reason: str, workdir: Path, undisturbed: Path) -> None:
    """The stage ends with code 1 and one line, and leaves nothing that is not whole, nor a claim."""
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith(f"failed: {reason}: '{workdir}/")
    assert error.endswith("[SEMI-E001]\n")
    assert error.count("\n") == 1
    assert not list(workdir.rglob("receipt.json"))
    assert not list(workdir.rglob(".writing-*"))
    assert not [path for path in workdir.rglob("claims/**/0*") if path.is_file()]
    left = {name: data for name, data in products(workdir).items() if "/excerpts/" not in name}
    assert left.items() <= products(undisturbed).items(), "what is there is whole"


def check_goes_on(config: StageConfig, kept: dict[str, bytes], undisturbed: Path) -> None:
    """With space again the stage ends as if there always had been, and scores no shard twice."""
    work(config)
    workdir = Path(config.workdir)
    assert products(workdir) == products(undisturbed)
    assert ledger(workdir) == ledger(undisturbed)
    assert kept.items() <= scored_shards(workdir).items(), "not scored again: the clocks in them are the same"
