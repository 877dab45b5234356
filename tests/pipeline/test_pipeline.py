"""The compiled pipeline, run by stock kfp.local in real processes: a laptop's disk, and buckets of real servers."""

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
from tests.support.stages import Stages

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {name: f"Sentinel0000{name}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}


def run(folder: Path, content: dict[str, Any], log: str = "plain") -> subprocess.CompletedProcess[str]:
    """Write a run file and run it as a user does, from a folder of his own."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "pipeline.py"), "run", str(path)]
    environment = {**os.environ, "SEMISCALE_LOG": log}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)


def left(folder: Path, bucket: str) -> dict[str, bytes]:
    """Return all that a run left, by path and URI: receipts, progress, reports, logs, and kfp's own files."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    objects = {one.uri: storage.read_bytes(one.uri) for one in storage.list_objects(bucket)}
    for kind in ("receipt.json", "/progress/", "results.json", "report.html", "local.log", "/receipts/"):
        assert any(kind in name for name in {**files, **objects}), kind
    return {**files, **objects}


def leaks(done: subprocess.CompletedProcess[str], everything: dict[str, bytes]) -> list[str]:
    """Return where a secret can be read: names of files and objects, and the terminal."""
    said = {"the terminal": (done.stdout + done.stderr).encode(), **everything}
    return [name for name, data in said.items() if any(secret.encode() in data for secret in SECRETS.values())]


def test_the_whole_pipeline_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    content = sample_images.write_run(tmp_path, baseline_learning_rates=[1.0])  # the students are of two
    first = run(tmp_path, content)
    assert first.returncode == 0, first.stdout + first.stderr
    assert leaks(first, left(tmp_path, f"{tmp_path}/work")) == []
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

    again = run(tmp_path, content)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before") >= 10
    assert "images, " not in again.stdout.split("on the test set")[0], "nothing is trained or scored a second time"
    assert "count · 1 of 2 pods: 0 of 3 shards to score" in again.stdout
    assert "count · 1 of 2 pods: 0 of 1 tars to pack" in again.stdout
    assert len(list(receipts.glob("scores-*.json"))) == 1, "one pod was started"
    found = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert found.pop("promotion") == {"promoted": False, "why": "the student is the champion already"}
    assert found == results


@pytest.mark.slow
def test_the_whole_pipeline_with_a_ready_made_teacher(tmp_path: Path) -> None:
    """A foreign file of a teacher that another run trained: nothing is trained in its place."""
    trained, _ = checkpoint_io.load_model(Stages(tmp_path / "other").teacher.checkpoint)
    torch.save(trained.state_dict(), tmp_path / "teacher.pth")
    content = sample_images.write_run(tmp_path, teacher_checkpoint="teacher.pth", student_start_weights="teacher.pth")
    done = run(tmp_path, content)
    assert done.returncode == 0, done.stdout + done.stderr
    receipts = tmp_path / "work" / "trial" / "receipts"
    teacher = load_document(str(receipts / "teacher.json"), TrainReceipt)
    assert (teacher.images_processed, teacher.source.partition("#")[0]) == (0, str(tmp_path / "teacher.pth"))
    sources = [
        load_document(str(receipts / f"{name}.json"), TrainReceipt).source for name in ("pretrained", "baselines-000")
    ]
    assert sources == [teacher.source] * 2
    results = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert results["teacher"]["top1"] > 0.8


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"test": "/nowhere"}, "refused: /nowhere: nothing here"),
        ({"images_per_clas": 3}, "unknown key; did you mean 'images_per_class'"),
        ({"student_architecture": "resnet5"}, "student_architecture: The architecture 'resnet5' is unknown"),
    ],
)
def test_bad_input_ends_a_run_in_one_line_with_code_2(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    done = run(tmp_path, sample_images.write_run(tmp_path, **changes))
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "train ·" not in done.stdout


def test_a_spent_budget_ends_a_run_with_code_3(tmp_path: Path) -> None:
    """Of the one training that is at work, too: nobody else's spending is looked at."""
    done = run(tmp_path, sample_images.write_run(tmp_path, budget_hours=0.00001, teacher_images_processed=480_000))
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: budget_hours: ")


def test_where_lines_are_json_a_run_ends_with_the_same_reason_and_code(tmp_path: Path) -> None:
    done = run(tmp_path, sample_images.write_run(tmp_path, test="/nowhere"), log="json")
    assert done.returncode == 2
    (error,) = map(json.loads, done.stderr.splitlines())
    assert error["message"].startswith("refused: /nowhere: nothing here")
    assert error["exit_code"] == 2


@pytest.mark.slow
def test_the_whole_pipeline_in_a_bucket(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and workdir in one bucket: no stage has a disk that another sees. The keys that open it are told nowhere."""
    for name, secret in SECRETS.items():  # the S3 server takes any
        monkeypatch.setenv(name, secret)
    content = sample_images.write_run(tmp_path)
    for path in (tmp_path / "data").rglob("*.*"):
        storage.upload(path, storage.join(remote, str(path.relative_to(tmp_path))))
    for name in ("labeled", "validation", "test", "unlabeled"):
        content[name] = [uri.replace(str(tmp_path), remote) for uri in content[name]]  # type: ignore[attr-defined]
    content |= {"workdir": f"{remote}/work", "classes": f"{remote}/data/classes.txt", "pods": 1}
    content |= {"baseline_learning_rates": [1.0], "finetune_learning_rates": [0.1]}
    done = run(tmp_path, content)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(storage.read_bytes(f"{remote}/work/trial/results.json"))
    assert results["student"]["top1"] > 0.8
    everything = left(tmp_path, remote)
    assert everything[f"{remote}/work/trial/report.html"].startswith(b"<!doctype html>")
    assert leaks(done, everything) == []
    assert leaks(done, {"here": SECRETS["AWS_SESSION_TOKEN"].encode()}) == ["here"]
