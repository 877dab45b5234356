"""Test the numbers and the escaping in the summaries of the Kubeflow UI."""

from pathlib import Path

import pytest

from semiscale.receipts.base import Receipt
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.markdown import escape_markdown, evaluation_scalars, summarize
from semiscale.receipts.merge import RetrainDecision
from semiscale.receipts.pack import PackReceipt
from tests.support.reports import (
    HANDLER,
    SCRIPT,
    make_evaluation_receipt,
    make_plan_receipt,
    make_promotion_receipt,
    make_score_receipt,
    make_selection_receipt,
    make_train_receipt,
)

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
    (
        make_plan_receipt(Path("here")),
        ["4 classes", "| labeled | 900 |", "| test | 1,200 |", "- not used: 1 × no label"],
    ),
    (
        make_train_receipt("finetune", 0.0025, 5, 30_000, 0.72),
        ["| validation top-1 | **72.00%** |", "| 30,000 | 2.5e-06 | 0.3249"],
    ),
    (
        make_score_receipt(Path("here"), 1),
        [
            "**15** of 16",
            "| shard groups | 1, of which 1 were already scored |",
            "2 images/s",
            "- failed: 1 × damaged image",
        ],
    ),
    (
        make_score_receipt(Path("here"), 0),
        ["| decode | 30.0 |\n| **forward**, the slowest: the others waited for it | 8.0 |\n| write | 0.5 |"],
    ),
    (
        make_selection_receipt(Path("here")),
        ["**29** images selected", "32 listed = 30 scored + 2 failed", "2 classes are short"],
    ),
    (make_selection_receipt(Path("here")).model_copy(update=KEPT), ["3.10% changed", "is 20.00%: **too little"]),
    (COUNTED, ["1 of 8 pods: 0 of 9 shards"]),
    (PACKED, ["1,500 images in 2 shuffled tars"]),
    (
        make_evaluation_receipt(),
        ["| student | **71.50%** | 69.50% to 73.50% | 5.00% |", "| student − baseline | +3.25 |"],
    ),
    (make_promotion_receipt(promoted=False), ["**The champion stays**: not worse than the champion"]),
]


@pytest.mark.parametrize(("receipt", "expected"), CASES, ids=lambda case: getattr(case, "stage", ""))
def test_summaries_contain_the_main_numbers(receipt: Receipt, expected: list[str]) -> None:
    text = summarize(receipt)
    assert [part for part in expected if part not in text] == []
    assert SCRIPT not in text


def test_names_from_the_input_are_escaped() -> None:
    assert escape_markdown("Müller's 3.5 mm, ok") == "Müller&#39;s 3.5 mm, ok"
    for hostile in (SCRIPT, HANDLER, "a|b", "[x](javascript:1)", "`code`", "line\nbreak", "*b*_i_"):
        assert not set(escape_markdown(hostile)) & set("<>\"'|[]()`*_\n=")


def test_the_summary_of_an_evaluation_has_the_result_on_the_test_images() -> None:
    text = summarize(make_evaluation_receipt())
    assert "Measured on the same 1,200 test images." in text
    assert "top-5" not in text, "there are four classes"
    assert "p (McNemar, two-sided)" in text
    assert "The test images decide on promotion." in text


def test_evaluation_scalars_are_percent_and_points() -> None:
    scalars = evaluation_scalars(make_evaluation_receipt())
    assert scalars["student top-1 (%)"] == 71.5
    assert scalars["gain over the baseline (points)"] == 3.25
    assert set(map(type, scalars.values())) == {float}
