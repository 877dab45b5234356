"""Test the date, version, device and elapsed time in the head of the page."""

import json
import re
import tomllib
from pathlib import Path

from semiscale.observability.task_status import TaskStatus
from tests.support.reports import read_page, write_report, write_run

ROOT = Path(__file__).resolve().parents[3]


def write_status(folder: Path, task: str, started: float, updated: float) -> None:
    """Write the status object of a finished task of the run."""
    status = TaskStatus(task=task, stage=task, pod="", state="finished", started=started, updated=updated)
    path = folder / "work" / "progress" / "fruit" / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(status.model_dump_json())


def read_facts(page: str) -> dict[str, str]:
    """Return the facts in the head of a page by their titles."""
    return dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page))


def test_the_head_has_date_version_and_device(tmp_path: Path) -> None:
    facts = read_facts(read_page(write_report(tmp_path, write_run(tmp_path))))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["Written"])
    assert facts["Program"] == f"semiscale {version}"
    assert facts["Scored on"] == "CPU"
    assert "Elapsed" not in facts, "no task left its status"


def test_the_head_has_the_elapsed_time_of_the_latest_attempt(tmp_path: Path) -> None:
    write_status(tmp_path, "teacher", 50, 90)
    write_status(tmp_path, "plan", 100, 110)
    write_status(tmp_path, "score", 110, 300)
    facts = read_facts(read_page(write_report(tmp_path, write_run(tmp_path))))
    assert facts["Elapsed"] == "3 min 20 s in the last attempt"


def test_the_head_names_the_card_that_scored(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    decision = tmp_path / "scores" / "decision.json"
    decision.write_text(json.dumps({"layout": 1, "compiled": True, "on": "NVIDIA H200, torch 2.9.0"}))
    assert read_facts(read_page(write_report(tmp_path, receipts)))["Scored on"] == "NVIDIA H200, torch 2.9.0"
    decision.write_text(json.dumps({"layout": 1, "compiled": False, "on": ""}))
    assert read_facts(read_page(write_report(tmp_path, receipts)))["Scored on"] == "a GPU"
