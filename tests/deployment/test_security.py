"""Test the statements of SECURITY.md on code, data and credentials."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.data import listing, reader
from semiscale.data.shard import SampleFields
from semiscale.models import checkpoint_metadata
from semiscale.receipts.base import Receipt
from semiscale.stages.pack.stage import build_tar
from semiscale.storage.documents import load_document
from tests.support import sample_images

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "pipeline.py", *sorted((ROOT / "components").rglob("*.py"))]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SENTINEL = "Sentinel0000SecretAccessKey0000000000000"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert find_unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "torch.load(x)", "torch.load(x, weights_only=False)", "yaml.load(x)"],
)
def test_every_way_to_unpickle_is_detected(source: str) -> None:
    assert find_unsafe_calls(source) != []


def find_unsafe_calls(source: str) -> list[str]:
    """Return the calls and imports of a source that can run code from their input."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            problems += [name for name in names if name.partition(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            call, options = (
                ast.unparse(node.func),
                {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
            )
            if call == "torch.load" and options.get("weights_only") != "True":
                problems.append(call)
            if call in ("yaml.load", "eval", "exec") or options.get("allow_pickle") == "True":
                problems.append(call)
    return problems


@pytest.mark.parametrize("name", ["Makefile", "docker/cpu.Dockerfile", "docker/cuda.Dockerfile"])
def test_all_installed_packages_are_pinned_by_digest(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ")
    installed = re.findall(r"pip (?:install|sync) [^;\n]*", text)
    assert any("-r" in command and "requirements/uv.txt" in command for command in installed)
    # Only this project itself is installed without digests.
    foreign = [command for command in installed if "--no-deps --no-build-isolation --editable ." not in command]
    assert [command for command in foreign if "--require-hashes" not in command] == []
    assert all("--hash=sha256:" in path.read_text() for path in (ROOT / "requirements").glob("*.txt"))


def test_members_of_a_tar_name_no_paths(tmp_path: Path) -> None:
    names = ["../../outside.png", "/etc/outside.png", "a/../../outside2.png"]
    folder = tmp_path / "below" / "pool"
    folder.mkdir(parents=True)
    sample_images.write_tar(folder / "pool.tar", {name: sample_images.draw_png(0, 0) for name in names})
    with tarfile.open(folder / "pool.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    (shard,) = listing.list_shards([str(folder)])
    samples = list(reader.iter_samples(shard, SampleFields()))
    assert [sample.key for sample in samples if sample.image.startswith(b"root:")] == []
    assert len(samples) >= len(names)
    images = [sample.image for sample in samples if sample.image]
    packed = build_tar(images, [0] * len(images), 0)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert all(re.fullmatch(r"\d{9}\.(cls|png|jpg|webp)", name) for name in tar.getnames())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../../elsewhere", "..", ".hidden", "/etc/x", "a/b", "a\n", "x" * 1000])
def test_the_digest_of_a_foreign_model_cannot_name_another_path(tmp_path: Path, name: str) -> None:
    """The digest is part of the names of its scores and measurements."""
    preprocessing = {"resolution": 8, "augmentation": "shift", "mean": [0.5] * 3, "std": [0.5] * 3}
    description = {"architecture": "resnet18", "classes": ["a"], "preprocessing": preprocessing, "recipe": "r"}
    for digest in ("0123456789abcdef", name):
        (tmp_path / "model.json").write_text(json.dumps({**description, "digest": digest}))
        (tmp_path / "receipt.json").write_text(
            json.dumps({"stage": "s", "digest": digest, "folder": "f", "seconds": 0})
        )
        if digest == name:
            with pytest.raises(InvalidInputError, match="not a CheckpointMetadata"):
                checkpoint_metadata.read_metadata(str(tmp_path / "model.safetensors"))
            with pytest.raises(InvalidInputError, match="not a Receipt"):
                load_document(str(tmp_path / "receipt.json"), Receipt)
        else:
            assert checkpoint_metadata.read_metadata(str(tmp_path / "model.safetensors"))
            assert load_document(str(tmp_path / "receipt.json"), Receipt)


def test_credentials_are_in_no_line_and_no_object(s3_bucket: str, tmp_path: Path) -> None:
    """One stage succeeds, and the bucket of the other is missing."""
    run = sample_images.write_run(tmp_path, workdir=f"{s3_bucket}/work")
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": SENTINEL, "AWS_SESSION_TOKEN": SENTINEL}
    results = [run_plan_stage(run, environment)]
    assert results[0].returncode == 0, results[0].stderr
    results.append(run_plan_stage({**run, "workdir": "s3://missing-bucket/work"}, environment))
    assert [result.returncode != 0 for result in results] == [False, True]
    assert [SENTINEL in result.stdout + result.stderr for result in results] == [False, False]
    objects = list(storage.list_objects(f"{s3_bucket}/work"))
    assert len(objects) > 5
    assert [entry.uri for entry in objects if SENTINEL.encode() in storage.read_bytes(entry.uri)] == []


def run_plan_stage(run: dict[str, object], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the plan stage of a run file in its own process."""
    lists = {name: value for name, value in run.items() if isinstance(value, list)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in run.items() if name not in lists]
    options += [f"--{name.replace('_', '-')}={item}" for name, value in lists.items() for item in value]
    command = [sys.executable, "-m", "semiscale.stages.plan", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
