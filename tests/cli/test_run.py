"""Test that `run` refuses a bad workdir at once, and that it shows a failure before the run ends."""

import io
import os
from pathlib import Path

import pytest
import yaml

from semiscale import storage
from semiscale.cli.main import main
from semiscale.cli.run import StageOutputFilter
from semiscale.common.errors import InvalidInputError
from tests.support import sample_images

REFUSAL = "refused: unlabeled: 1 of 60 images failed. Repair the image. [SEMI-E307]"


def run_with_workdir(root: Path, workdir: str) -> int:
    """Run a run file with a workdir, and return the exit code."""
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(sample_images.write_run(root, workdir=workdir)))
    return main(None, ["run", str(path)])


def assert_refused(workdir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the refusal names the workdir, in one line."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"refused: workdir: {workdir} ")
    assert line.endswith("[SEMI-E209]")


def test_a_file_in_place_of_the_workdir_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_with_workdir(tmp_path, str(tmp_path / "file")) == 2
    assert_refused(str(tmp_path / "file"), capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to every folder")
def test_a_read_only_workdir_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").mkdir(mode=0o500)
    assert run_with_workdir(tmp_path, str(tmp_path / "work")) == 2
    assert_refused(str(tmp_path / "work"), capsys)


def test_a_bucket_that_does_not_exist_is_refused(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The log of a run on a bucket would be in the current directory.
    monkeypatch.chdir(tmp_path)
    assert run_with_workdir(tmp_path, f"{remote}-missing/work") == 2
    assert_refused(f"{remote}-missing/work", capsys)
    assert not list(storage.list_objects(f"{remote}-missing/work"))


def test_a_failure_is_shown_at_once_and_kept_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISCALE_LOG", "plain")
    screen, log = io.StringIO(), io.StringIO()
    output = StageOutputFilter(screen, log)
    output.write(f"merge · 1 of 1 shard groups\n    {REFUSAL}\n")
    assert screen.getvalue().splitlines()[:2] == ["merge · 1 of 1 shard groups", REFUSAL]
    output.write("train · 10 images\n    failed: later. [SEMI-E001]\n")
    assert "train · 10 images\nfailed: later. [SEMI-E001]\n" in screen.getvalue()
    assert isinstance(output.failure, InvalidInputError)
    assert output.failure.code == "SEMI-E307"


def test_a_stage_that_a_signal_stopped_is_not_shown_as_failed() -> None:
    screen, log = io.StringIO(), io.StringIO()
    output = StageOutputFilter(screen, log)
    output.write("failed: SIGTERM: the process was stopped. Finished work is kept. [SEMI-E002]\n")
    assert screen.getvalue() == ""
    assert "SIGTERM" in log.getvalue()
    assert output.failure
    assert output.failure.code == "SEMI-E002"
