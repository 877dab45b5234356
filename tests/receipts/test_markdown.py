"""What the Kubeflow UI shows beside a stage: numbers a person looks for, and foreign names as text."""

from pathlib import Path

import pytest

from semiscale.receipts.base import Receipt
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.markdown import escape_markdown, evaluation_scalars, summarize
from semiscale.receipts.merge import RetrainDecision
from semiscale.receipts.pack import PackReceipt
from tests.stages.report.test_report import HANDLER, SCRIPT, decided, evaluated, planned, scored, selected, trained

KEPT = {"renewal": RetrainDecision(changed=0.031, retrain_above=0.2, kept=True)}
PACKED = PackReceipt(
    stage="pack",
    digest="k",
    folder="pack",
    seconds=1,
    shards="",
    tars=2,
    samples=1500,
    class_counts=[],
    size_bytes=4000,
)
COUNTED = FanoutReceipt(stage="count", digest="c", folder="f", seconds=1, pods=1, why="1 of 8 pods: 0 of 9 shards")
CASES: list[tuple[Receipt, list[str]]] = [
    (planned(Path("here")), ["4 classes", "| labeled | 900 |", "| test | 1,200 |", "- not used: 1 × no label"]),
    (
        trained("finetune", 0.0025, 5, 30_000, 0.72),
        ["| validation top-1 | **72.00%** |", "| 30,000 | 2.5e-06 | 0.3249"],
    ),
    (
        scored(Path("here"), 1),
        ["**15** of 16", "| units | 1, of which 1 were", "2 images/s", "- failed: 1 × damaged image"],
    ),
    (
        scored(Path("here"), 0),
        ["| decode | 30.0 |\n| **forward**, the slowest: the others waited for it | 8.0 |\n| write | 0.5 |"],
    ),
    (selected(Path("here")), ["**29** images selected", "32 listed = 30 scored + 2 failed", "2 classes are short"]),
    (selected(Path("here")).model_copy(update=KEPT), ["3.10% changed", "is 20.00%: **too little"]),
    (COUNTED, ["1 of 8 pods: 0 of 9 shards"]),
    (PACKED, ["1,500 images in 2 shuffled tars"]),
    (evaluated(), ["| student | **71.50%** | 69.50% to 73.50% | 91.50% | 0.0500 |", "| student − baseline | +3.25 |"]),
    (decided(promoted=False), ["**The champion stays**: not worse than the champion"]),
]


@pytest.mark.parametrize(("receipt", "said"), CASES, ids=lambda case: getattr(case, "stage", ""))
def test_what_a_summary_says(receipt: Receipt, said: list[str]) -> None:
    text = summarize(receipt)
    assert [one for one in said if one not in text] == []
    assert SCRIPT not in text


def test_a_foreign_name_is_no_markup() -> None:
    assert escape_markdown("Müller's 3.5 mm, ok") == "Müller&#39;s 3.5 mm, ok"
    for hostile in (SCRIPT, HANDLER, "a|b", "[x](javascript:1)", "`code`", "line\nbreak", "*b*_i_"):
        assert not set(escape_markdown(hostile)) & set("<>\"'|[]()`*_\n=")


def test_the_numbers_that_runs_are_compared_by() -> None:
    found = evaluation_scalars(evaluated())
    assert found["student top-1 (%)"] == 71.5
    assert found["gain over the baseline (points)"] == 3.25
    assert set(map(type, found.values())) == {float}
