"""Test stages on full disks, and merging and packing pods that are killed.

The results have the bytes of an undisturbed run. test_score_faults.py kills scoring pods.
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
from tests.support import sample_images, selections
from tests.support.stages import Stages


def start_stage(config: StageConfig, max_file_bytes: int = -1) -> subprocess.Popen[str]:
    """Start a stage in a process of its own, with a limit for the size of a file."""
    fields = config.model_dump(exclude_defaults=True)
    options = [
        f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, list) else value}"
        for name, value in fields.items()
    ]
    command = [sys.executable, "-m", f"semiscale.stages.{config.stage}", *options]

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=limit_file_size,
    )


def read_results(workdir: Path) -> dict[str, bytes]:
    """Return the results of a stage, by their paths in the workdir.

    Receipts and parts are left out, because they have times. Leases are no results.
    """
    return {
        str(path.relative_to(workdir)): path.read_bytes().replace(str(workdir).encode(), b"")
        for path in sorted((workdir / "stages").rglob("*"))
        if path.is_file() and path.name != "receipt.json" and not {"claims", "settled", "parts"} & set(path.parts)
    }


def read_group_receipts(workdir: Path) -> list[str]:
    """Return the receipts of scored shard groups without their times and the workdir."""
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


def read_scored_shards(workdir: Path) -> dict[str, bytes]:
    """Return the scores of single shards by name, and check that each is complete."""
    parts = {path: path.read_bytes() for path in workdir.glob("stages/score/*/parts/*")}
    for path, data in parts.items():
        teacher = path.parts[-3].partition("-")[0]
        assert shard_scores.shard_scores_from_parquet(data, path.name, teacher).count.scored == 100
    return {path.name: data for path, data in parts.items()}


def count_finished(workdir: Path) -> int:
    """Count the finished files, which do not have a temporary name."""
    return sum(not path.name.startswith(".") for path in (workdir / "stages").rglob("*.*"))


def pack_config(root: Path, workdir: Path, pod: int = 0) -> PackConfig:
    """Return the config of packing 80 small tars from Parquet files and tars."""
    if not (root / "selection.json").exists():
        sample_images.write_pool(root / "pool", 4, 100)
        for number in range(4):
            sample_images.write_parquet(root / "pool" / f"{number}.parquet", 33, seed=5000 + 100 * number)
        selections.write_selection(root, str(root / "pool"), per_class=250)
    plan, selection = str(root / "plan.json"), str(root / "selection.json")
    return PackConfig(workdir=str(workdir), plan=plan, selection=selection, pod=pod, packed_tar_bytes=2000)


def merge_config(stages: Stages, workdir: Path) -> MergeConfig:
    """Return the config of merging a scored pool in another workdir."""
    scores = [stages.uri(receipt) for receipt in stages.scores]
    return MergeConfig(
        workdir=str(workdir), plan=stages.uri(stages.plan), scores=scores, images_per_class=300,
        classes_per_image=2, max_failed_fraction=0.0,
    )  # fmt: skip


def expire_leases(workdir: Path) -> None:
    """Let the leases of dead pods expire, which would take two minutes."""
    for lease in workdir.rglob("claims/**/0*"):
        if lease.is_file():
            lease.write_text(json.dumps({"holder": "dead", "until": 0}))


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_packing_pods_do_not_change_the_result(tmp_path: Path, kills: int) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    pack(pack_config(tmp_path, undisturbed))
    rng = random.Random(kills)
    for _ in range(kills):
        before = count_finished(disturbed)
        pods = [start_stage(pack_config(tmp_path, disturbed, pod)) for pod in (0, 1)]
        while count_finished(disturbed) <= before and any(pod.poll() is None for pod in pods):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        for pod in pods:
            pod.send_signal(signal.SIGKILL)
            pod.communicate()
        expire_leases(disturbed)
    assert not list(disturbed.rglob("receipt.json")) or kills > 3, "the pods were killed before they finished"
    pack(pack_config(tmp_path, disturbed))
    results = {name: data for name, data in read_results(disturbed).items() if "/.writing-" not in name}
    assert results == read_results(undisturbed)
    assert len(results) > 70


def test_a_packing_pod_releases_its_lease_after_sigterm(tmp_path: Path) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    pack(pack_config(tmp_path, undisturbed))
    pod = start_stage(pack_config(tmp_path, stopped))
    while count_finished(stopped) < 5 and pod.poll() is None:
        time.sleep(0.001)
    pod.send_signal(signal.SIGTERM)
    _, error = pod.communicate(timeout=60)
    assert pod.returncode == 128 + signal.SIGTERM
    assert "SEMI-E002" in error
    assert error.count("\n") == 1
    assert not [path for path in stopped.rglob("claims/**/0*") if path.is_file()]
    assert not list(stopped.rglob("receipt.json"))
    pack(pack_config(tmp_path, stopped))
    assert read_results(stopped) == read_results(undisturbed)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a scored pool."""
    root = tmp_path_factory.mktemp("scored")
    stages = Stages(root, unlabeled=[str(sample_images.write_pool(root / "large", 8, 100))])
    assert stages.scores
    return stages


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_merges_do_not_change_the_result(scored: Stages, tmp_path: Path, kills: int) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    merge(merge_config(scored, undisturbed))
    rng = random.Random(kills)
    for _ in range(kills):
        process = start_stage(merge_config(scored, disturbed))
        while not (disturbed / "stages").exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in disturbed.rglob("selection.parquet"):
            assert path.read_bytes() in read_results(undisturbed).values(), "a file with its final name is complete"
    merge(merge_config(scored, disturbed))
    assert {name: data for name, data in read_results(disturbed).items() if "/.writing-" not in name} == read_results(
        undisturbed
    )


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """Mount a file system of this size, or skip the test if mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("stage", "size_bytes"), [("pack", 128 << 10), ("merge", 16 << 10), ("score", 56 << 10)])
def test_a_full_disk_stops_a_stage_with_a_one_line_error(
    scored: Stages, tmp_path: Path, stage: str, size_bytes: int
) -> None:
    undisturbed, disk = tmp_path / "undisturbed", tmp_path / "disk"
    run_stage(config_of(stage, scored, tmp_path, undisturbed))
    with small_disk(disk, size_bytes):
        check_stopped(
            start_stage(config_of(stage, scored, tmp_path, disk)),
            "[Errno 28] No space left on device",
            disk,
            undisturbed,
        )
        scored_shards = read_scored_shards(disk)
        assert stage != "score" or 0 < len(scored_shards) < 8
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        check_resumes(config_of(stage, scored, tmp_path, disk), scored_shards, undisturbed)


@pytest.mark.parametrize("stage", ["pack", "merge", "score"])
def test_a_file_size_limit_stops_a_stage_with_a_one_line_error(scored: Stages, tmp_path: Path, stage: str) -> None:
    undisturbed, quota = tmp_path / "undisturbed", tmp_path / "quota"
    run_stage(config_of(stage, scored, tmp_path, undisturbed))
    process = start_stage(config_of(stage, scored, tmp_path, quota), max_file_bytes=8 << 10)
    check_stopped(process, "[Errno 27] File too large", quota, undisturbed)
    scored_shards = read_scored_shards(quota)
    # The scores of a shard are smaller than the limit. Those of a shard group are larger.
    assert len(scored_shards) == (8 if stage == "score" else 0)
    check_resumes(config_of(stage, scored, tmp_path, quota), scored_shards, undisturbed)


def config_of(stage: str, scored: Stages, root: Path, workdir: Path) -> StageConfig:
    """Return the config of a stage by its name."""
    if stage == "pack":
        return pack_config(root, workdir)
    if stage == "merge":
        return merge_config(scored, workdir)
    plan, teacher = scored.uri(scored.plan), scored.uri(scored.teacher)
    return ScoreConfig(workdir=str(workdir), plan=plan, teacher=teacher, pod=0, images_per_class=12)


def run_stage(config: StageConfig) -> None:
    """Run a stage in this process."""
    match config:
        case PackConfig():
            pack(config)
        case MergeConfig():
            merge(config)
        case ScoreConfig():
            score(config)


def check_stopped(process: subprocess.Popen[str], reason: str, workdir: Path, undisturbed: Path) -> None:
    """Check that a stage fails with one line, and leaves no partial files or leases."""
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith(f"failed: {reason}: '{workdir}/")
    assert error.endswith("[SEMI-E001]\n")
    assert error.count("\n") == 1
    assert not list(workdir.rglob("receipt.json"))
    assert not list(workdir.rglob(".writing-*"))
    assert not [path for path in workdir.rglob("claims/**/0*") if path.is_file()]
    results = {name: data for name, data in read_results(workdir).items() if "/excerpts/" not in name}
    assert results.items() <= read_results(undisturbed).items(), "all files are complete"


def check_resumes(config: StageConfig, scored_shards: dict[str, bytes], undisturbed: Path) -> None:
    """Check that a stage finishes when it has space again, and scores no shard twice.

    Args:
        config: The stage, which stopped without space.
        scored_shards: The scores that the stage had written by then.
        undisturbed: The workdir of the same stage, which always had space.
    """
    run_stage(config)
    workdir = Path(config.workdir)
    assert read_results(workdir) == read_results(undisturbed)
    assert read_group_receipts(workdir) == read_group_receipts(undisturbed)
    # The parts have times, so equal bytes show that no shard was scored again.
    assert scored_shards.items() <= read_scored_shards(workdir).items()
