"""Test the console command `semiscale` of an installed package."""

import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from semiscale.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SOURCES = ("pipeline.py", "components", "semiscale", "manifests", "requirements", "pyproject.toml")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package in a new environment offline, and return its programs."""
    root = tmp_path_factory.mktemp("installed")
    # The build writes into its source, which is a copy for that reason.
    for name in SOURCES:
        source, target = ROOT / name, root / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(root / "env")], check=True)
    # The environment uses the pinned dependencies of the tests. Python reads the path file after the environment's own
    # packages, so the installed package comes before the checkout.
    (packages,) = (root / "env" / "lib").glob("python*/site-packages")
    (packages / "pinned.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = str(root / "env" / "bin" / "python")
    install = [*uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--python", environment, str(root / "source")], check=True)
    return root / "env" / "bin"


def run_command(installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the console command outside the checkout."""
    return subprocess.run([str(installed / "semiscale"), *arguments], capture_output=True, text=True, cwd=folder)


def test_the_command_has_the_verbs_and_its_own_name_in_help_texts(installed: Path, tmp_path: Path) -> None:
    process = run_command(installed, tmp_path, "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: semiscale ")
    assert re.findall(r"^    ([a-z-]+)\b", process.stdout, re.MULTILINE) == list(COMMANDS)
    examples = run_command(installed, tmp_path, "submit", "--help").stdout
    assert "  semiscale submit my-run.yaml\n" in examples


def test_the_command_compiles_the_graph_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    inputs = "".join(f"{key}: [gs://b/{key}]\n" for key in ("labeled", "unlabeled", "test"))
    (tmp_path / "run.yaml").write_text(f"name: birds\nworkdir: gs://b/work\n{inputs}")
    process = run_command(installed, tmp_path, "compile", "run.yaml")
    assert process.returncode == 0, process.stderr
    assert "gs://b/unlabeled" in (tmp_path / "birds.pipeline.yaml").read_text()
    paths = "import semiscale.cli.demo as demo; print(demo.__file__, demo.RUN_FILE, demo.RUN_FILE.is_file())"
    printed = subprocess.run(
        [str(installed / "python"), "-c", paths], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    module, run_file, exists = printed.split()
    assert Path(module).is_relative_to(installed.parent)
    assert Path(run_file).is_relative_to(installed.parent)
    assert exists == "True"


def test_a_verb_that_needs_the_repository_is_refused(installed: Path, tmp_path: Path) -> None:
    process = run_command(installed, tmp_path, "images")
    assert process.returncode == 2
    assert "[SEMI-E404]" in process.stderr
