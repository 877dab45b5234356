"""Test the report stage: results, receipts, and the refusal of bad inputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.receipts.merge import PoolAccounting
from semiscale.receipts.report import ReportReceipt
from tests.support.reports import (
    SCRIPT,
    make_evaluation_receipt,
    make_selection_receipt,
    read_page,
    write_report,
    write_run,
)


def test_the_results_have_exactly_the_published_shape(written_report: ReportReceipt) -> None:
    results = json.loads(Path(written_report.results).read_text())
    models = {name: results.pop(name) for name in ("teacher", "baseline", "pretrained", "student")}
    assert {name: (model["top1"], model["top5"]) for name, model in models.items()} == {
        "teacher": (0.74, 0.94),
        "baseline": (0.6825, 0.8825),
        "pretrained": (0.725, 0.925),
        "student": (0.715, 0.915),
    }
    assert models["student"] == {
        "top1": 0.715,
        "top5": 0.915,
        "calibration_error": 0.05,
        "top1_interval": [0.695, 0.735],
        "top5_interval": [0.905, 0.925],
        "calibration_error_interval": [0.04, 0.06],
    }
    comparisons = results.pop("comparisons")
    assert {name: comparison["difference"] for name, comparison in comparisons.items()} == {
        "teacher": -0.025,
        "baseline": 0.0325,
        "pretrained": -0.01,
    }
    assert comparisons["baseline"].keys() == {"wins", "losses", "difference", "interval", "p_value", "p_worse"}
    assert results == {
        "promotion": {"promoted": True, "why": f"not worse than the champion: {SCRIPT}"},
        "selection": {
            "images": 29,
            "unique_images": 20,
            "classes": 4,
            "short_classes": 2,
            "images_per_class": 12,
            "classes_per_image": 3,
        },
        "ledger": {"listed": 32, "scored": 30, "failed": 2, "removed": 0},
        "seconds": {
            "plan": 1.5,
            "teacher": 20,
            "baseline": 91.5,
            "score": 20.5,
            "merge": 2,
            "pack": 0.75,
            "pretrain": 25,
            "finetune": 11,
            "evaluate": 4,
        },
    }


def test_the_receipt_names_both_files_under_the_run(written_report: ReportReceipt) -> None:
    assert (written_report.stage, written_report.report, written_report.results) == (
        "report",
        f"{written_report.folder}/report.html",
        f"{written_report.folder}/results.json",
    )
    assert written_report.folder.endswith("/work/fruit")


def test_report_never_reuses_an_earlier_page(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    first = read_page(write_report(tmp_path, receipts))
    second = read_page(write_report(tmp_path, {**receipts, "evaluation": [make_evaluation_receipt(0.735)]}))
    assert first != second


def test_receipts_of_an_earlier_round_are_deleted(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    stored = Path(write_report(tmp_path, receipts).folder) / "receipts"
    before = {path.name for path in stored.iterdir()}
    write_report(tmp_path, {**receipts, "scores": receipts["scores"][:1]})
    assert before - {path.name for path in stored.iterdir()} == {"scores-001.json"}
    assert {"plan.json", "promotion.json", "students-001.json"} < before


def test_receipts_of_shard_groups_are_not_read_without_failures(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    shutil.rmtree(tmp_path / "scores")
    whole = make_selection_receipt(tmp_path).model_copy(
        update={"ledger": PoolAccounting(listed=30, scored=30, failed=0, removed=0), "failed": {}}
    )
    assert "none failed" in read_page(write_report(tmp_path, {**receipts, "selection": [whole]}))


def test_an_evaluation_of_other_models_is_refused(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    receipts["students"] = receipts["students"][:1]
    with pytest.raises(InvalidInputError, match=r"student is training finetune-0\.00025.* finetune-0\.0025.*SEMI-E355"):
        write_report(tmp_path, receipts)


def test_accounting_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    hole = make_selection_receipt(tmp_path).model_copy(
        update={"ledger": PoolAccounting(listed=33, scored=30, failed=2, removed=0)}
    )
    with pytest.raises(SemiscaleError, match="33 listed, but 30 scored.*SEMI-E356"):
        write_report(tmp_path, {**receipts, "selection": [hole]})


def test_the_stage_imports_no_torch() -> None:
    # The container image of the stage has no torch.
    code = "import sys, semiscale.stages.report.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
