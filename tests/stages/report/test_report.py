"""Test the report: its numbers, its escaping, and the page in a real browser."""

import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data.image_decoding import decode_image
from semiscale.data.labeled import LabeledSplit
from semiscale.data.listing import list_shards
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Shard, ShardGroup
from semiscale.receipts.base import BadSample, Receipt
from semiscale.receipts.evaluate import ConfusionMatrix, EvaluationReceipt, ModelMetrics, PairedComparison
from semiscale.receipts.merge import (
    ClassSelectionStats,
    ExclusionStats,
    PoolAccounting,
    RetrainDecision,
    SelectionReceipt,
)
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.report import ReportReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt, ShardAccounting, ShardGroupReceipt
from semiscale.receipts.train import CurvePoint, TrainReceipt
from semiscale.stages.report import charts, number_format
from semiscale.stages.report.gallery import THUMBNAIL_PX, evenly_spaced, powers_of_ten, thumbnail
from semiscale.stages.report.stage import ReportConfig, report

SCRIPT = "<script>alert(1)</script>"
HANDLER = '"><img src=x onerror=alert(1)>'
CLASSES = ["apple", SCRIPT, "long" * 20, "empty"]
# Images selected for each class, with K = 12. The gallery shows ranks 1, 10 and the last.
SELECTED_COUNTS = [12, 12, 5, 0]
TEST_IMAGES = 1200
HEADINGS = [
    "Result", "Selection", "Accounting of the pool", "Gallery", "Learning curves", "Learning-rate sweeps", "Time",
    "Notes of the plan", "Accuracy by class", "Confusions", "Run file",
]  # fmt: skip


def png(seed: int, width: int = 32, height: int = 32) -> bytes:
    """Return an image of coarse random blocks, which is recognisable when it is enlarged."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def write_pool(folder: Path) -> list[Shard]:
    """Write 20 loose images, one with a hostile name, and a Parquet file of ten more."""
    folder.mkdir()
    for number in range(19):
        (folder / f"{number:03}.png").write_bytes(png(number, width=300 if number % 3 == 0 else 32))
    (folder / f"{HANDLER}.png").write_bytes(png(19))
    table = pa.table({"image": [png(100 + row, 48, 32) for row in range(10)], "key": [SCRIPT] * 10})
    pq.write_table(table, folder / "pool.parquet")
    return list_shards([str(folder)])


def selection_rows(shards: list[Shard]) -> list[dict[str, object]]:
    """Return rows as the merge writes them. Images at odd ranks lie in the Parquet file."""
    parquet, loose = shards
    rows: list[dict[str, object]] = []
    for label, count in enumerate(SELECTED_COUNTS):
        for rank in range(count):
            row = {"class": label, "rank": rank, "score": 6.0 - rank, "position": label}
            index = (5 * label + rank) % 10
            if rank % 2:
                size = len(png(100 + index, 48, 32))
                location = {"shard": parquet.name, "index": index, "key": SCRIPT, "uri": parquet.uri, "offset": -1}
            else:
                file = loose.files[-1 - index]
                size = file.size_bytes
                location = {"shard": loose.name, "index": 19 - index, "key": file.name, "uri": file.uri, "offset": 0}
            rows.append({**row, **location, "size_bytes": size})
    return rows


def write_selection(path: Path, rows: list[dict[str, object]]) -> None:
    types = {
        "class": pa.uint16(), "rank": pa.int32(), "score": pa.float32(), "position": pa.uint8(), "shard": pa.string(),
        "index": pa.int64(), "key": pa.string(), "uri": pa.string(), "offset": pa.int64(), "size_bytes": pa.int64(),
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), path)


def train_receipt(recipe: str, rate: float, seconds: float, images: int, validation_top1: float) -> TrainReceipt:
    steps = [images * step // 40 for step in range(1, 41)]
    curve = [
        CurvePoint(
            images_processed=step,
            learning_rate=rate * 0.1 ** (number // 10),
            loss=0.3 + 1.9 * math.exp(-number / 9),
            validation_top1=validation_top1 * (1 - math.exp(-(number + 1) / 9)) if number % 5 == 4 else None,
        )
        for number, step in enumerate(steps)
    ]
    return TrainReceipt(
        stage="train", digest=f"{recipe}-{rate:g}", folder="models", seconds=seconds, recipe=recipe,
        architecture="resnet50" if recipe == "teacher" else "resnet18", checkpoint="models/model.safetensors",
        parameters=11_689_512, classes=CLASSES, preprocessing=Preprocessing(resolution=32, augmentation="shift"),
        images_processed=images, samples=900, learning_rate=rate, validation_top1=validation_top1, curve=curve,
        images_per_s=812.5,
    )  # fmt: skip


def labeled_split(samples: int) -> LabeledSplit:
    return LabeledSplit(digest="s", index="index", shards="shards", samples=samples, class_counts=[samples // 4] * 4)


def plan_receipt(folder: Path) -> PlanReceipt:
    return PlanReceipt(
        stage="plan", digest="p", folder="plan", seconds=1.5, name="fruit", pool_digest="u", classes=CLASSES,
        train=labeled_split(900), validation=labeled_split(100), test=labeled_split(TEST_IMAGES),
        units=str(folder / "units.json"), shards=2, size_bytes=123_456, pods=2, classes_per_image=3,
        failed={"no label": 1}, failures=[BadSample(shard=SCRIPT, key=HANDLER, reason="no label")],
        notes=["classes_per_image 10 clamped to the 4 classes there are"],
        run={"name": "fruit", "labeled": [f"{SCRIPT}.tar"], "seed": 0},
    )  # fmt: skip


def score_receipt(folder: Path, pod: int) -> ScoreReceipt:
    """Return the receipt of a pod.

    Pod 0 scored longest and waited for its device. Pod 1 waited for its CPUs.
    """
    return ScoreReceipt(
        stage="score", digest=f"pod{pod}", folder=str(folder / "scores"), seconds=(12.25, 8.25)[pod], pod=pod,
        teacher="t", units=1, units_found=pod, listed=16, scored=15, failed={"damaged image": 1},
        clocks=PartSeconds(read=1, decode=30, forward=8, write=0.5), slowest=("forward", "decode")[pod],
    )  # fmt: skip


def selection_receipt(folder: Path) -> SelectionReceipt:
    per_class = [
        ClassSelectionStats(
            name=name, wanted=12, found=count, unique=count, full=count == 12, last_score=7.0 - count if count else None
        )
        for name, count in zip(CLASSES, SELECTED_COUNTS, strict=True)
    ]
    return SelectionReceipt(
        stage="merge", digest="m", folder="merge", seconds=2, selection=str(folder / "selection.parquet"), teacher="t",
        images=29, unique_images=20, changed_by_last_tenth=0.1, images_per_class=12, classes_per_image=3,
        per_class=per_class,
        ledger=PoolAccounting(listed=32, scored=30, failed=2, removed=0), failed={"damaged image": 2}, bytes_read=4096,
    )  # fmt: skip


def evaluation_receipt(student: float = 0.715, pretrained: float = 0.725) -> EvaluationReceipt:
    top1 = {"teacher": 0.74, "baseline": 0.6825, "pretrained": pretrained, "student": student}
    receipts = {
        "teacher": "teacher-0.1",
        "baseline": "baseline-0.1",
        "pretrained": "pretrain-0.1",
        "student": "finetune-0.00025",
    }
    models = {
        name: ModelMetrics(
            top1=value, top5=round(value + 0.2, 4), calibration_error=0.05, top1_interval=(value - 0.02, value + 0.02),
            top5_interval=(round(value + 0.19, 4), round(value + 0.21, 4)), calibration_error_interval=(0.04, 0.06),
            images=TEST_IMAGES, architecture="resnet18", receipt=receipts[name], training="", predictions="",
            learning_rate=0.1,
        )
        for name, value in top1.items()
    }  # fmt: skip
    return EvaluationReceipt(
        stage="evaluate", digest="e", folder="evaluate", seconds=4, models=models,
        per_class={name: [value, value - 0.1, value + 0.1, value] for name, value in top1.items()},
        per_class_intervals={name: [(0.5, 0.9)] * 4 for name in top1},
        chosen={"baseline": 0.1, "student": 0.00025}, tried={},
        comparisons=[paired_comparison(name, student - value) for name, value in top1.items() if name != "student"],
        confusion=ConfusionMatrix(
            classes=CLASSES, counts=[[290, 10, 0, 0], [1, 299, 0, 0], [50, 50, 200, 0], [0, 0, 0, 300]]
        ),
    )  # fmt: skip


def paired_comparison(name: str, difference: float) -> PairedComparison:
    return PairedComparison(
        model="student", against=name, wins=60, losses=21, difference=round(difference, 4),
        interval=(difference - 0.01, difference + 0.01), p_value=0.00002, p_worse=0.99999,
    )  # fmt: skip


def promotion_receipt(promoted: bool = True) -> PromotionReceipt:
    return PromotionReceipt(
        stage="promote", digest="d", folder="fruit", seconds=0.1, champion="champions/fruit.json", model="f",
        promoted=promoted, why=f"not worse than the champion: {SCRIPT}",
        comparison=paired_comparison("champion", 0.004),
    )  # fmt: skip


def group_receipt(group: ShardGroup) -> ShardGroupReceipt:
    """Return the receipt of a shard group with two failures, which have hostile names."""
    counts = [
        ShardAccounting(shard=shard.name, digest=shard.digest(), listed=16, scored=15, failed={"damaged image": 1})
        for shard in group.shards
    ]
    return ShardGroupReceipt(
        pod=0,
        stage="score", digest=group.digest, folder="scores", seconds=5, teacher="t", scores="", places="", samples="",
        shards=counts, clocks=PartSeconds(),
        failures=[BadSample(shard="pool.parquet", key=key, reason="damaged image") for key in (SCRIPT, HANDLER)],
    )  # fmt: skip


def write_run(folder: Path) -> dict[str, list[Receipt]]:
    """Write the pool, selection and scores of a finished run.

    Returns:
        The receipts by field of ReportConfig.
    """
    shards = write_pool(folder / "pool")
    write_selection(folder / "selection.parquet", selection_rows(shards))
    group = ShardGroup(digest="unit0", shards=shards)
    (folder / "units.json").write_text(json.dumps([group.model_dump()]))
    (folder / "scores" / group.digest).mkdir(parents=True)
    (folder / "scores" / group.digest / "receipt.json").write_text(group_receipt(group).model_dump_json())
    return {
        "plan": [plan_receipt(folder)],
        "teacher": [train_receipt("teacher", 0.1, 20, 100_000, 0.75)],
        "baselines": [
            train_receipt("baseline", rate, 30.5, 250_000, 0.7 - abs(rate - 0.1)) for rate in (0.05, 0.1, 0.2)
        ],
        "scores": [score_receipt(folder, 0), score_receipt(folder, 1)],
        "selection": [selection_receipt(folder)],
        "packed": [
            PackReceipt(
                stage="pack", digest="k", folder="pack", seconds=0.75, shards="", tars=1, samples=29,
                class_counts=SELECTED_COUNTS, size_bytes=40_000,
            )
        ],
        "pretrained": [train_receipt("pretrain", 0.1, 25, 220_000, 0.71)],
        "students": [train_receipt("finetune", rate, 5.5, 30_000, 0.72 - rate) for rate in (0.0025, 0.00025)],
        "evaluation": [evaluation_receipt()],
        "promotion": [promotion_receipt()],
    }  # fmt: skip


def write_report(folder: Path, receipts: dict[str, list[Receipt]]) -> ReportReceipt:
    """Write the receipts and run the stage."""
    uris: dict[str, list[str]] = {}
    for name, group in receipts.items():
        paths = [folder / f"{name}-{number}.json" for number in range(len(group))]
        for path, receipt in zip(paths, group, strict=True):
            path.write_text(receipt.model_dump_json())
        uris[name] = list(map(str, paths))
    many = ("baselines", "scores", "students")
    inputs = {name: group if name in many else group[0] for name, group in uris.items()}
    return report(ReportConfig.model_validate({"workdir": str(folder / "work"), **inputs}))


def read_page(receipt: ReportReceipt) -> str:
    return Path(receipt.report).read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ReportReceipt:
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, write_run(folder))


def test_the_results_have_exactly_the_published_shape(written: ReportReceipt) -> None:
    results = json.loads(Path(written.results).read_text())
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


def test_the_receipt_names_both_files_under_the_run(written: ReportReceipt) -> None:
    assert (written.stage, written.report, written.results) == (
        "report",
        f"{written.folder}/report.html",
        f"{written.folder}/results.json",
    )
    assert written.folder.endswith("/work/fruit")


class Elements(HTMLParser):
    """Elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_hostile_names_stay_text(written: ReportReceipt) -> None:
    elements = Elements(read_page(written)).elements
    attributes = {name for _, attrs in elements for name in attrs}
    sources = [attrs["src"] or "" for _, attrs in elements if "src" in attrs]
    assert "default-src 'none'" in read_page(written)
    assert "script" not in {tag for tag, _ in elements}
    assert not [name for name in attributes if name.startswith("on")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert SCRIPT in [str(attrs.get("title", "")).rpartition(" · ")[2] for _, attrs in elements]


def test_page_lists_failures_and_short_classes(written: ReportReceipt) -> None:
    page = read_page(written)
    assert "damaged image (2)" in page
    assert "no label (1)" in page
    assert "2 of 4 classes are short" in page
    assert "clamped to the 4 classes" in page
    assert "Slowest part: forward pass. A faster accelerator" in page, "decoding has more threads"


def test_page_states_a_loss_by_fine_tuning(written: ReportReceipt) -> None:
    page = read_page(written)
    assert "3.25 points above</strong> the baseline" in page
    assert "Fine-tuning took away 1.00 points" in page


@pytest.mark.parametrize(
    ("student", "sentence"), [(0.735, "Fine-tuning added 1.00 points"), (0.725, "Fine-tuning changed nothing")]
)
def test_page_states_the_effect_of_fine_tuning(tmp_path: Path, student: float, sentence: str) -> None:
    receipts = write_run(tmp_path)
    assert sentence in read_page(write_report(tmp_path, {**receipts, "evaluation": [evaluation_receipt(student)]}))


def page_text(page: str) -> str:
    """Return the text of a page with single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_page_shows_intervals_and_comparisons(written: ReportReceipt) -> None:
    text = page_text(read_page(written))
    assert "71.50% 69.5% to 73.5%" in text
    assert "Baseline +3.25 +2.25 to +4.25 60 21 <0.001" in html.unescape(text)
    assert "Champion +0.40 −0.60 to +1.40 60 21 <0.001" in html.unescape(text)
    assert "The student is the champion now : not worse than the champion" in text


def test_page_states_that_the_test_images_decide_on_promotion(written: ReportReceipt) -> None:
    text = page_text(read_page(written))
    assert "The test images are used for these figures and for the promotion only." in text


def test_page_shows_the_confusions(written: ReportReceipt) -> None:
    elements = Elements(read_page(written)).elements
    shares = [attrs["style"] for tag, attrs in elements if tag == "td" and attrs.get("class") == "wrong"]
    assert shares == [f"--share:{share}%" for share in (3, 0, 0, 0, 0, 0, 17, 17, 0, 0, 0, 0)]


def test_page_states_that_the_earlier_selection_is_kept(tmp_path: Path) -> None:
    earlier = selection_receipt(tmp_path).model_copy(
        update={"renewal": RetrainDecision(changed=0.031, retrain_above=0.2, kept=True)}
    )
    receipts = write_run(tmp_path) | {"selection": [earlier], "promotion": [promotion_receipt(promoted=False)]}
    text = page_text(read_page(write_report(tmp_path, receipts)))
    assert "3.10% of it changed since students were last trained; retrain_above is 20.00%. Too little" in text
    assert "The champion stays" in text


def test_a_ready_made_teacher_has_no_curve(tmp_path: Path, written: ReportReceipt) -> None:
    ready_made = {"images_processed": 0, "samples": 0, "learning_rate": 0.0, "curve": [], "source": "gs://b/a.pth"}
    receipts = write_run(tmp_path)
    receipts["teacher"] = [receipts["teacher"][0].model_copy(update=ready_made)]
    page = read_page(write_report(tmp_path, receipts))
    assert "teacher ends at" in read_page(written).lower()
    assert "teacher ends at" not in page.lower()
    assert "baseline" in page


def test_page_warns_of_a_choice_at_the_edge_of_a_sweep(written: ReportReceipt) -> None:
    page = read_page(written)
    # The baseline chose 0.1 of 0.05, 0.1 and 0.2, which is not at an edge.
    assert page.count("that was tried: a") == 1
    assert "the smallest that was tried" in page


def test_page_states_that_long_lists_are_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semiscale.stages.report.gallery.MAX_CLASSES", 2)
    monkeypatch.setattr("semiscale.stages.report.view_models.MAX_SHORT_CLASSES_LISTED", 1)
    monkeypatch.setattr("semiscale.stages.report.failure_examples.MAX_EXAMPLES", 1)
    page = " ".join(read_page(write_report(tmp_path, write_run(tmp_path))).split())
    assert "2 of 4 classes are shown" in page
    assert "and 1 more, marked below" in page
    assert "damaged image (2). 1 of them" in page


def test_page_marks_images_that_are_gone_or_changed(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    rows = selection_rows(list_shards([str(tmp_path / "pool")]))
    # Rank 1 of classes 0 and 2.
    Path(str(rows[0]["uri"])).unlink()
    # Rank 1 of class 1.
    Path(str(rows[12]["uri"])).write_bytes(b"shorter")
    # Ranks 10 and 12 of two classes.
    with (tmp_path / "pool" / "pool.parquet").open("ab") as file:
        file.write(b"more")
    page = read_page(write_report(tmp_path, receipts))
    assert page.count("gone or changed since it was scored") == 7


def test_report_never_reuses_an_earlier_page(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    first = read_page(write_report(tmp_path, receipts))
    second = read_page(write_report(tmp_path, {**receipts, "evaluation": [evaluation_receipt(0.735)]}))
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
    whole = selection_receipt(tmp_path).model_copy(
        update={"ledger": PoolAccounting(listed=30, scored=30, failed=0, removed=0), "failed": {}}
    )
    assert "none failed" in read_page(write_report(tmp_path, {**receipts, "selection": [whole]}))


def test_page_names_unmatched_keys_of_the_removal_list(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    removal = ExclusionStats(keys=1200, unmatched=2, examples=["other.png", SCRIPT])
    page = read_page(
        write_report(
            tmp_path, {**receipts, "selection": [selection_receipt(tmp_path).model_copy(update={"removal": removal})]}
        )
    )
    assert re.search(r"2 of 1,200 keys of the\s+removal list match no scored image", page)
    assert "<code>other.png</code>" in page
    assert SCRIPT not in page


def test_rejects_an_evaluation_of_other_models(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    receipts["students"] = receipts["students"][:1]
    with pytest.raises(InvalidInputError, match=r"student is training finetune-0\.00025.* finetune-0\.0025.*SEMI-E355"):
        write_report(tmp_path, receipts)


def test_rejects_accounting_that_does_not_add_up(tmp_path: Path) -> None:
    receipts = write_run(tmp_path)
    hole = selection_receipt(tmp_path).model_copy(
        update={"ledger": PoolAccounting(listed=33, scored=30, failed=2, removed=0)}
    )
    with pytest.raises(SemiscaleError, match="33 listed, but 30 scored.*SEMI-E356"):
        write_report(tmp_path, {**receipts, "selection": [hole]})


def test_runs_without_torch() -> None:
    """Check that the stage imports no torch, because its container image has none."""
    code = "import sys, semiscale.stages.report.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [0, 1, 2]), (20, list(range(20))), (1000, [round(i * 999 / 19) for i in range(20)])]
)
def test_gallery_classes_are_evenly_spaced(count: int, expected: list[int]) -> None:
    assert evenly_spaced(count, 20) == expected


def test_gallery_ranks_are_powers_of_ten_below_k() -> None:
    assert (powers_of_ten(1), powers_of_ten(10), powers_of_ten(16_000)) == ([], [1], [1, 10, 100, 1000, 10_000])


@pytest.mark.parametrize(("width", "shown", "tiny"), [(32, 32, True), (96, 96, False), (400, 96, False)])
def test_thumbnails_only_shrink(width: int, shown: int, tiny: bool) -> None:
    source, enlarged = thumbnail(decode_image(png(0, width, width // 2)))
    data = source.partition("base64,")[2]
    assert source.startswith("data:image/png" if tiny else "data:image/jpeg")
    assert enlarged is tiny
    assert len(data) < 4 * THUMBNAIL_PX**2
    assert shown <= THUMBNAIL_PX


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (number_format.number(1234567), "1,234,567"),
        (number_format.count_noun(1, "tar"), "1 tar"),
        (number_format.count_noun(2000, "tar"), "2,000 tars"),
        (number_format.percent(0.841), "84.10%"),
        (number_format.percent(1.0), "100.00%"),
        (number_format.percent(0.999999), ">99.99%"),
        (number_format.percent(0.000001), "<0.01%"),
        (number_format.percent(0.0, 1), "0.0%"),
        (number_format.percentage_points(0.031), "+3.10"),
        (number_format.percentage_points(-0.004), "−0.40"),
        (number_format.percentage_points(-0.00001), "0.00"),
        (number_format.compare_in_words(-0.004), "0.40 points below"),
        (number_format.compare_in_words(0.0), "equal to"),
        (number_format.probability(0.0), "50.00%"),
        (number_format.probability(-800.0), "<0.01%"),
        (number_format.probability(800.0), ">99.99%"),
        (number_format.p_value(0.0341), "0.034"),
        (number_format.p_value(0.00002), "<0.001"),
        (number_format.format_learning_rate(0.00025), "0.00025"),
        (number_format.format_learning_rate(0.000001), "0.000001"),
        (number_format.format_learning_rate(10.0), "10"),
        (number_format.duration(0.0063), "0.006 s"),
        (number_format.duration(0.0), "0 s"),
        (number_format.duration(59.97), "1 min 00 s"),
        (number_format.duration(4.24), "4.2 s"),
        (number_format.duration(192), "3 min 12 s"),
        (number_format.duration(3_600_000), "1,000 h 00 min"),
        (number_format.size(812), "812 bytes"),
        (number_format.size(1_200_000_000), "1.2 GB"),
    ],
)
def test_numbers_are_formatted_for_people(formatted: str, expected: str) -> None:
    assert formatted == expected


def test_axes_have_round_ticks() -> None:
    assert [text for _, text in charts.images_scale(1_038_000_000).ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in charts.percent_scale([0.41, 0.733]).ticks] == ["40%", "50%", "60%", "70%", "80%"]
    assert [text for _, text in charts.loss_scale([2.3, 0.4]).ticks] == ["0", "0.5", "1", "1.5", "2", "2.5"]
    assert [text for _, text in charts.log_scale([0.6, 0.00007]).ticks] == [
        "10⁻⁵",
        "10⁻⁴",
        "10⁻³",
        "10⁻²",
        "10⁻¹",
        "1",
    ]


def test_losses_that_differ_a_lot_are_drawn_on_a_log_scale() -> None:
    scale = charts.loss_scale([2.3, 0.0])
    assert [text for _, text in scale.ticks] == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1", "10¹"]
    assert scale.share(0.0) == 0


@pytest.mark.parametrize("scale", [charts.percent_scale([0.5]), charts.loss_scale([1e-9]), charts.log_scale([0.1])])
def test_a_scale_of_a_single_value_has_a_width(scale: charts.Scale) -> None:
    assert len(scale.ticks) >= 2
    assert scale.low < scale.high


def test_a_line_spans_the_plot_area() -> None:
    drawn = charts.chart("Top-1", [charts.Series("one", "student", [(0, 1.0), (1000, 0.0)])], charts.percent_scale)
    frame = charts.FRAME
    assert drawn.lines[0].path == f"{frame.left},{frame.top} {frame.right},{frame.bottom}"
    assert drawn.x_label == "images processed, thousands"
    assert drawn.summary == "Top-1 by images processed: one ends at 0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page is not tested in a browser")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        chromium_browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield chromium_browser
        chromium_browser.close()


def record_page_events(page: Page) -> list[str]:
    """Return a list that records messages, dialogs and requests of the page."""
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: events.append(f"request: {request.url[:80]}"))
    return events


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_page_in_a_browser(written: ReportReceipt, browser: Browser, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    events = record_page_events(page)
    uri = Path(written.report).as_uri()
    page.goto(uri)
    assert [
        event for event in events if event != f"request: {uri[:80]}" and not event.startswith("request: data:")
    ] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").inner_text() == "fruit"
    assert page.locator("h2").all_inner_texts() == HEADINGS
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    # Three classes have ranks 1, 10 and the last. The short one has no rank 10.
    assert loaded == [True] * 8
    context.close()
