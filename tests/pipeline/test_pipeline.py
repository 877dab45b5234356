"""Run the compiled pipeline with kfp.local, on a disk and in buckets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from semiscale import storage
from semiscale.models import checkpoint_io
from semiscale.receipts.train import TrainReceipt
from semiscale.storage.documents import load_document
from tests.support import sample_images
from tests.support.killed_tasks import count_attempts, killer_environment
from tests.support.stages import Stages

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {name: f"Sentinel0000{name}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}


def run_pipeline(
    folder: Path, content: dict[str, Any], log: str = "plain", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Write a run file, and run it from another folder as a user does.

    Args:
        folder: Folder of the run file.
        content: Content of the run file.
        log: Format of the log.
        variables: More environment variables.
    """
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "pipeline.py"), "run", str(path)]
    environment = {**os.environ, "SEMISCALE_LOG": log, **variables}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)


def read_outputs(folder: Path, bucket: str) -> dict[str, bytes]:
    """Return all files and objects of a run by path and URI, with those of kfp."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    objects = {entry.uri: storage.read_bytes(entry.uri) for entry in storage.list_objects(bucket)}
    for kind in ("receipt.json", "/progress/", "results.json", "report.html", "local.log", "/receipts/"):
        assert any(kind in name for name in {**files, **objects}), kind
    return {**files, **objects}


def find_leaks(completed: subprocess.CompletedProcess[str], outputs: dict[str, bytes]) -> list[str]:
    """Return the names of files, objects and the terminal that have a secret."""
    texts = {"the terminal": (completed.stdout + completed.stderr).encode(), **outputs}
    return [name for name, data in texts.items() if any(secret.encode() in data for secret in SECRETS.values())]


def test_the_second_run_of_the_whole_pipeline_reuses_all_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    # The students have two learning rates.
    content = sample_images.write_run(tmp_path, baseline_learning_rates=[1.0])
    first = run_pipeline(tmp_path, content)
    assert first.returncode == 0, first.stdout + first.stderr
    assert find_leaks(first, read_outputs(tmp_path, f"{tmp_path}/work")) == []
    results = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    models = {"teacher", "baseline", "pretrained", "student"}
    assert results.keys() == models | {"comparisons", "promotion", "selection", "ledger", "seconds"}
    assert results.pop("promotion")["promoted"]
    for model in models:
        assert 0.8 < results[model]["top1"] <= results[model]["top5"] == 1.0
    assert results["ledger"] == {"listed": 120, "scored": 120, "failed": 0, "removed": 0}
    assert results["selection"]["images"] == 36
    assert "student after fine-tuning" in first.stdout
    assert "report: work/trial/report.html" in first.stdout
    assert "count · 2 of 2 pods: 3 of 3 shards to score" in first.stdout
    receipts = tmp_path / "work" / "trial" / "receipts"
    assert len(list(receipts.glob("scores-*.json"))) == 2

    again = run_pipeline(tmp_path, content)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before") >= 10
    assert "images, " not in again.stdout.split("on the test set")[0], "nothing is trained or scored a second time"
    assert "count · 1 of 2 pods: 0 of 3 shards to score" in again.stdout
    assert "count · 1 of 2 pods: 0 of 1 tars to pack" in again.stdout
    assert len(list(receipts.glob("scores-*.json"))) == 1, "one pod was started"
    results_again = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert results_again.pop("promotion") == {"promoted": False, "why": "the student is the champion already"}
    assert results_again == results


@pytest.mark.slow
def test_the_whole_pipeline_with_a_ready_made_teacher(tmp_path: Path) -> None:
    """The teacher is a foreign file, and the run trains no other teacher."""
    trained, _ = checkpoint_io.load_model(Stages(tmp_path / "other").teacher.checkpoint)
    torch.save(trained.state_dict(), tmp_path / "teacher.pth")
    content = sample_images.write_run(tmp_path, teacher_checkpoint="teacher.pth", student_start_weights="teacher.pth")
    completed = run_pipeline(tmp_path, content)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    receipts = tmp_path / "work" / "trial" / "receipts"
    teacher = load_document(str(receipts / "teacher.json"), TrainReceipt)
    assert (teacher.images_processed, teacher.source.partition("#")[0]) == (0, str(tmp_path / "teacher.pth"))
    sources = [
        load_document(str(receipts / f"{name}.json"), TrainReceipt).source for name in ("pretrained", "baselines-000")
    ]
    assert sources == [teacher.source] * 2
    results = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert results["teacher"]["top1"] > 0.8


@pytest.mark.slow
def test_a_run_survives_that_every_task_is_killed_before_and_after_its_work(tmp_path: Path) -> None:
    """A pod has the environment variable of the supervisor, which a run on one machine does not set."""
    (tmp_path / "attempts").mkdir()
    results = []
    for folder, variables in (
        (tmp_path / "calm", {}),
        (tmp_path / "killed", killer_environment(tmp_path / "attempts")),
    ):
        folder.mkdir()
        content = sample_images.write_run(folder, baseline_learning_rates=[1.0], finetune_learning_rates=[1.0])
        completed = run_pipeline(folder, content, **variables)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        results.append(json.loads((folder / "work" / "trial" / "results.json").read_text()))
        # The task that promotes was killed after it had promoted the student. Its next attempt finds the champion.
        assert results[-1].pop("promotion")["promoted"] == (not variables)
        results[-1].pop("seconds")
    attempts = count_attempts(tmp_path / "attempts")
    assert len(attempts) == 14, "every task of the graph was killed"
    # The last packing task has the name of the first packing pod.
    assert {**attempts, "pack-0": 3} == dict.fromkeys(attempts, 3)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"test": "/nowhere"}, "refused: /nowhere: nothing here"),
        ({"images_per_clas": 3}, "unknown. Did you mean 'images_per_class'"),
        ({"student_architecture": "resnet5"}, "student_architecture: The architecture 'resnet5' is unknown"),
    ],
)
def test_bad_input_ends_a_run_with_a_single_line_and_code_2(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    completed = run_pipeline(tmp_path, sample_images.write_run(tmp_path, **changes))
    assert completed.returncode == 2
    assert line in completed.stderr
    assert len(completed.stderr.strip().splitlines()) == 1
    assert "train ·" not in completed.stdout


def test_a_spent_budget_ends_a_run_with_code_3(tmp_path: Path) -> None:
    """A training also counts its own time.

    It does this before it reads the spending of other tasks.
    """
    completed = run_pipeline(
        tmp_path, sample_images.write_run(tmp_path, budget_hours=0.00001, teacher_images_processed=480_000)
    )
    assert completed.returncode == 3, completed.stdout + completed.stderr
    (line,) = completed.stderr.splitlines()
    assert line.startswith("failed: budget_hours: ")


def test_a_run_with_json_lines_ends_with_the_same_reason_and_code(tmp_path: Path) -> None:
    completed = run_pipeline(tmp_path, sample_images.write_run(tmp_path, test="/nowhere"), log="json")
    assert completed.returncode == 2
    (error,) = map(json.loads, completed.stderr.splitlines())
    assert error["message"].startswith("refused: /nowhere: nothing here")
    assert error["exit_code"] == 2


@pytest.mark.slow
def test_the_whole_pipeline_in_a_bucket(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and workdir are in one bucket, and no output has the credentials."""
    # The S3 server accepts any credentials.
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    content = sample_images.write_run(tmp_path)
    for path in (tmp_path / "data").rglob("*.*"):
        storage.upload(path, storage.join(remote, str(path.relative_to(tmp_path))))
    for name in ("labeled", "validation", "test", "unlabeled"):
        content[name] = [uri.replace(str(tmp_path), remote) for uri in content[name]]  # type: ignore[attr-defined]
    content |= {"workdir": f"{remote}/work", "classes": f"{remote}/data/classes.txt", "pods": 1}
    content |= {"baseline_learning_rates": [1.0], "finetune_learning_rates": [0.1]}
    completed = run_pipeline(tmp_path, content)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    results = json.loads(storage.read_bytes(f"{remote}/work/trial/results.json"))
    assert results["student"]["top1"] > 0.8
    outputs = read_outputs(tmp_path, remote)
    assert outputs[f"{remote}/work/trial/report.html"].startswith(b"<!doctype html>")
    assert find_leaks(completed, outputs) == []
    assert find_leaks(completed, {"here": SECRETS["AWS_SESSION_TOKEN"].encode()}) == ["here"]
