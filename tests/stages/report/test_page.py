"""Test the page: figures, sentences, warnings, and the escaping of names."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from semiscale.receipts.evaluate import has_top5
from semiscale.receipts.merge import ExclusionStats, RetrainDecision
from semiscale.receipts.report import ReportReceipt
from tests.support.reports import (
    SCRIPT,
    make_evaluation_receipt,
    make_promotion_receipt,
    make_selection_receipt,
    read_page,
    write_report,
    write_run,
)


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_hostile_names_stay_text(written_report: ReportReceipt) -> None:
    elements = Elements(read_page(written_report)).elements
    attributes = {name for _, attrs in elements for name in attrs}
    sources = [attrs["src"] or "" for _, attrs in elements if "src" in attrs]
    assert "default-src 'none'" in read_page(written_report)
    assert "script" not in {tag for tag, _ in elements}
    assert not [name for name in attributes if name.startswith("on")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert SCRIPT in [str(attrs.get("title", "")).rpartition(" · ")[2] for _, attrs in elements]


def test_the_page_lists_failures_and_short_classes(written_report: ReportReceipt) -> None:
    page = read_page(written_report)
    assert "damaged image (2)" in page
    assert "no label (1)" in page
    assert "2 of 4 classes are short" in page
    assert "clamped to the 4 classes" in page
    assert "Slowest part: forward pass. A faster accelerator" in page, "decoding has more threads"


def test_the_page_states_a_loss_by_fine_tuning(written_report: ReportReceipt) -> None:
    page = read_page(written_report)
    assert "3.25 points above</strong> the baseline" in page
    assert "Fine-tuning took away 1.00 points" in page


@pytest.mark.parametrize(
    ("student", "sentence"), [(0.735, "Fine-tuning added 1.00 points"), (0.725, "Fine-tuning changed nothing")]
)
def test_the_page_states_the_effect_of_fine_tuning(tmp_path: Path, student: float, sentence: str) -> None:
    receipts = write_run(tmp_path)
    assert sentence in read_page(write_report(tmp_path, {**receipts, "evaluation": [make_evaluation_receipt(student)]}))


def extract_text(page: str) -> str:
    """Return the text of a page with single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_page_shows_intervals_and_comparisons(written_report: ReportReceipt) -> None:
    text = extract_text(read_page(written_report))
    assert "71.50% 69.5% to 73.5%" in text
    assert "Baseline +3.25 +2.25 to +4.25 60 21 <0.001" in html.unescape(text)
    assert "Champion +0.40 −0.60 to +1.40 60 21 <0.001" in html.unescape(text)
    assert "The student is the champion now : not worse than the champion" in text


def test_the_page_states_that_the_test_images_decide_on_promotion(written_report: ReportReceipt) -> None:
    text = extract_text(read_page(written_report))
    assert "The test images are used for these figures and for the promotion only." in text


def test_the_page_shows_the_confusions(written_report: ReportReceipt) -> None:
    elements = Elements(read_page(written_report)).elements
    shares = [attrs["style"] for tag, attrs in elements if tag == "td" and attrs.get("class") == "wrong"]
    assert shares == [f"--share:{share}%" for share in (3, 0, 0, 0, 0, 0, 17, 17, 0, 0, 0, 0)]


def test_the_page_states_that_the_earlier_selection_stays(tmp_path: Path) -> None:
    earlier = make_selection_receipt(tmp_path).model_copy(
        update={"renewal": RetrainDecision(changed=0.031, retrain_above=0.2, kept=True)}
    )
    receipts = write_run(tmp_path) | {"selection": [earlier], "promotion": [make_promotion_receipt(promoted=False)]}
    text = extract_text(read_page(write_report(tmp_path, receipts)))
    assert "3.10% of it changed since students were last trained; retrain_above is 20.00%. Too little" in text
    assert "The champion stays" in text


def test_a_ready_made_teacher_has_no_curve(tmp_path: Path, written_report: ReportReceipt) -> None:
    ready_made = {"images_processed": 0, "samples": 0, "learning_rate": 0.0, "curve": [], "source": "gs://b/a.pth"}
    receipts = write_run(tmp_path)
    receipts["teacher"] = [receipts["teacher"][0].model_copy(update=ready_made)]
    page = read_page(write_report(tmp_path, receipts))
    assert "teacher ends at" in read_page(written_report).lower()
    assert "teacher ends at" not in page.lower()
    assert "baseline" in page


def test_the_page_warns_of_a_choice_at_the_edge_of_a_sweep(written_report: ReportReceipt) -> None:
    page = read_page(written_report)
    # The baseline chose 0.1 of 0.05, 0.1 and 0.2, which is not at an edge.
    assert page.count("that was tried: a") == 1
    assert "the smallest that was tried" in page


def test_equal_accuracies_of_a_sweep_give_no_advice(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    receipts["students"] = [receipt.model_copy(update={"validation_top1": 0.3}) for receipt in receipts["students"]]
    page = read_page(write_report(tmp_path, receipts))
    assert "that was tried: a" not in page
    assert "2 learning rates had the same validation top-1. The smallest of them was chosen." in page


def test_the_page_warns_of_a_teacher_at_chance(
    tmp_path: Path, written_report: ReportReceipt, capsys: pytest.CaptureFixture[str]
) -> None:
    receipts = write_run(tmp_path)
    receipts["teacher"] = [receipts["teacher"][0].model_copy(update={"validation_top1": 0.25})]
    assert "not better than chance" in read_page(write_report(tmp_path, receipts))
    assert "warning" in capsys.readouterr().out
    assert "not better than chance" not in read_page(written_report)


def test_top_5_is_shown_for_more_than_five_classes_only(written_report: ReportReceipt) -> None:
    assert "top&#8209;5" not in read_page(written_report)
    assert [has_top5(classes) for classes in (2, 5, 6)] == [False, False, True]


def test_the_page_names_both_p_values(written_report: ReportReceipt) -> None:
    text = extract_text(read_page(written_report))
    assert "Images lost p (two-sided)" in text
    assert "the one-sided test that the student is worse" in text


def test_the_page_states_that_long_lists_are_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semiscale.stages.report.gallery.MAX_CLASSES", 2)
    monkeypatch.setattr("semiscale.stages.report.view_models.MAX_SHORT_CLASSES_LISTED", 1)
    monkeypatch.setattr("semiscale.stages.report.failure_examples.MAX_EXAMPLES", 1)
    page = " ".join(read_page(write_report(tmp_path, write_run(tmp_path))).split())
    assert "2 of 4 classes are shown" in page
    assert "and 1 more, marked below" in page
    assert "damaged image (2). 1 of them" in page


def test_the_page_names_unmatched_keys_of_the_removal_list(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    removal = ExclusionStats(keys=1200, unmatched=2, examples=["other.png", SCRIPT])
    selection = make_selection_receipt(tmp_path).model_copy(update={"removal": removal})
    page = read_page(write_report(tmp_path, {**receipts, "selection": [selection]}))
    assert re.search(r"2 of 1,200 keys of the\s+removal list match no scored image", page)
    assert "<code>other.png</code>" in page
    assert SCRIPT not in page
