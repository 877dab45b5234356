"""Test the help of every verb, refused options, and `run --docker`."""

import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from semiscale import storage
from semiscale.cli import docker_runner
from semiscale.cli.images import _revision, _run_command
from semiscale.cli.main import build_parser, main
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.runtime.entrypoints import run_with_exit_code
from tests.support import sample_images

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    *("run", "plan", "watch", "submit", "schedule", "cancel", "reselect", "promote", "measure", "transfer"),
    *("export", "compile", "images"),
    *("demo", "demo-images"),
)
CODES = ("0", "1", "2", "3", "4", "129", "130", "143")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_that_parse_and_the_exit_codes(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(pipeline.semiscale, [verb, "--help"])
    help_text = capsys.readouterr().out
    examples = re.findall(r"^  python pipeline\.py (.*)$", help_text, re.MULTILINE)
    assert examples
    for example in examples:
        build_parser(pipeline.semiscale).parse_args([part.strip("'") for part in re.findall(r"'[^']*'|\S+", example)])
    assert re.findall(r"^ *(\d+)  \w", help_text.split("exit codes:")[1], re.MULTILINE) == list(CODES)


def test_the_documentation_has_every_verb_and_exit_code() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    for verb in (name for name in VERBS if not name.startswith("demo")):
        assert f"| `{verb}" in text, verb
    table = text.split("meaning\n")[1].split("```")[0]
    assert [line.split()[0] for line in table.splitlines()] == list(CODES)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("plan", "--budget=nan"), "argument --budget: expected a number of 0 or more; found 'nan'"),
        (("plan", "--budget=-1"), "argument --budget: expected a number of 0 or more; found '-1'"),
        (("watch", "--every=inf"), "argument --every: expected a number of 0 or more; found 'inf'"),
        (("plan", "--classes=-1"), "argument --classes: expected a whole number of 0 or more; found '-1'"),
        (("compile", "--output=pipeline.txt"), "[SEMI-E403]"),
    ],
)
def test_invalid_options_are_refused_with_exit_code_2(
    tmp_path: Path, arguments: tuple[str, str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, option = arguments
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sample_images.write_run(tmp_path)))
    try:
        code: object = main(pipeline.semiscale, [verb, str(path), option])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert line in capsys.readouterr().err


def test_a_missing_object_is_named(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_exit_code(lambda: print(storage.read_bytes(f"{bucket}/units.json"))) == 1
    assert capsys.readouterr().err.startswith(f"failed: {bucket}/units.json: no such file.")


def test_the_cause_in_the_output_of_docker_comes_before_its_advice() -> None:
    script = "import sys; sys.exit('#1 ERROR\\nERROR: no buildx\\n  Install it:\\n  https://docs.example')"
    with pytest.raises(SemiscaleError, match=r"ERROR: no buildx   Install it:   https://docs.example \[SEMI-E406\]$"):
        _run_command(sys.executable, "-c", script)


def load_settings(root: Path, **changes: Any) -> RunConfig:
    """Return a run file on real images."""
    return run_config.validate_run_config(sample_images.write_run(root, **changes), "here").with_absolute_uris()


def test_containers_read_the_inputs_and_write_only_to_the_workdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test needs no Docker.
    monkeypatch.setattr(docker_runner, "require_docker", lambda images: None)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settings = load_settings(tmp_path, unlabeled=[str(tmp_path / "data" / "pool" / "pool-*.tar")])
    arguments = docker_runner.docker_runner(settings, "", tmp_path / "lock").container_run_args
    mounted = {mount["Target"]: mount["ReadOnly"] for mount in arguments["mounts"]}
    writable = [path for path, read_only in mounted.items() if not read_only]
    assert writable == [str(tmp_path / "work")]
    assert str(tmp_path / "data" / "pool") in mounted
    assert str(tmp_path / "data" / "classes.txt") in mounted
    assert (arguments["network_mode"], arguments["read_only"]) == ("none", True)
    assert "AWS_SECRET_ACCESS_KEY" not in arguments["environment"], "no bucket, no credentials"
    assert arguments["environment"]["OMP_NUM_THREADS"] == "3", "two containers at a time share the cores"


def test_containers_of_a_run_on_buckets_get_the_network_and_the_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.json").write_text("{}")
    monkeypatch.setattr(docker_runner, "require_docker", lambda images: None)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    arguments = docker_runner.docker_runner(
        load_settings(tmp_path, workdir="s3://b/work"), "", tmp_path / "lock"
    ).container_run_args
    assert "network_mode" not in arguments
    assert arguments["environment"]["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert str(tmp_path / "key.json") in [mount["Target"] for mount in arguments["mounts"]]
    assert all(mount["ReadOnly"] for mount in arguments["mounts"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_docker_a_run_in_containers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(InvalidInputError, match=r"SEMI-E408") as refusal:
        docker_runner.docker_runner(load_settings(tmp_path), "", tmp_path / "lock")
    assert "\n" not in str(refusal.value)
    del refusal
    # The client of docker leaves its unconnected socket open.
    gc.collect()


@pytest.mark.parametrize(
    ("changed_path", "is_marked"),
    [("manifests/overlays/gke/kustomization.yaml", False), ("README.md", False), ("components/new.py", True),
     ("docker/cpu.Dockerfile", True)],
)  # fmt: skip
def test_a_changed_input_of_the_images_marks_their_revision(tmp_path: Path, changed_path: str, is_marked: bool) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / changed_path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / changed_path).write_text("new")
    assert re.fullmatch(r"[0-9a-f]{12}-changed" if is_marked else r"[0-9a-f]{12}", _revision(tmp_path))
