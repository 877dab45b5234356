"""A small finished run for tests: its images, selection and receipts."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from semiscale.data.labeled import LabeledSplit
from semiscale.data.listing import list_shards
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Shard, ShardGroup
from semiscale.receipts.base import BadSample, Receipt
from semiscale.receipts.evaluate import ConfusionMatrix, EvaluationReceipt, ModelMetrics, PairedComparison
from semiscale.receipts.merge import ClassSelectionStats, PoolAccounting, SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.report import ReportReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt, ShardAccounting, ShardGroupReceipt
from semiscale.receipts.train import CurvePoint, TrainReceipt
from semiscale.stages.report.stage import ReportConfig, report

SCRIPT = "<script>alert(1)</script>"
HANDLER = '"><img src=x onerror=alert(1)>'
CLASSES = ["apple", SCRIPT, "long" * 20, "empty"]
# Images selected for each class, with K = 12. The gallery shows ranks 1, 10 and the last.
SELECTED_COUNTS = [12, 12, 5, 0]
TEST_IMAGES = 1200


def make_png(seed: int, width: int = 32, height: int = 32) -> bytes:
    """Return an image of coarse random blocks, which stays recognizable when enlarged."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def write_pool(folder: Path) -> list[Shard]:
    """Write 20 loose images, one with a hostile name, and a Parquet file of ten more."""
    folder.mkdir()
    for number in range(19):
        (folder / f"{number:03}.png").write_bytes(make_png(number, width=300 if number % 3 == 0 else 32))
    (folder / f"{HANDLER}.png").write_bytes(make_png(19))
    table = pa.table({"image": [make_png(100 + row, 48, 32) for row in range(10)], "key": [SCRIPT] * 10})
    pq.write_table(table, folder / "pool.parquet")
    return list_shards([str(folder)])


def make_selection_rows(shards: list[Shard]) -> list[dict[str, object]]:
    """Return rows as the merge writes them.

    Images at odd ranks are in the Parquet file.
    """
    parquet, loose = shards
    rows: list[dict[str, object]] = []
    for label, count in enumerate(SELECTED_COUNTS):
        for rank in range(count):
            row = {"class": label, "rank": rank, "score": 6.0 - rank, "position": label}
            index = (5 * label + rank) % 10
            if rank % 2:
                size = len(make_png(100 + index, 48, 32))
                location = {"shard": parquet.name, "index": index, "key": SCRIPT, "uri": parquet.uri, "offset": -1}
            else:
                file = loose.files[-1 - index]
                size = file.size_bytes
                location = {"shard": loose.name, "index": 19 - index, "key": file.name, "uri": file.uri, "offset": 0}
            rows.append({**row, **location, "size_bytes": size})
    return rows


def write_selection(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as the merge writes its selection."""
    types = {
        "class": pa.uint16(), "rank": pa.int32(), "score": pa.float32(), "position": pa.uint8(), "shard": pa.string(),
        "index": pa.int64(), "key": pa.string(), "uri": pa.string(), "offset": pa.int64(), "size_bytes": pa.int64(),
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), path)


def make_train_receipt(recipe: str, rate: float, seconds: float, images: int, validation_top1: float) -> TrainReceipt:
    """Return the receipt of a training whose curve has 40 points.

    Args:
        recipe: The recipe of the training.
        rate: The learning rate.
        seconds: The duration.
        images: The images that were processed.
        validation_top1: The accuracy that the curve approaches.
    """
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


def make_labeled_split(samples: int) -> LabeledSplit:
    """Return a split of four classes of equal size."""
    return LabeledSplit(digest="s", index="index", shards="shards", samples=samples, class_counts=[samples // 4] * 4)


def make_plan_receipt(folder: Path) -> PlanReceipt:
    """Return the receipt of the plan, with hostile names in its failures."""
    return PlanReceipt(
        stage="plan", digest="p", folder="plan", seconds=1.5, name="fruit", pool_digest="u", classes=CLASSES,
        train=make_labeled_split(900), validation=make_labeled_split(100), test=make_labeled_split(TEST_IMAGES),
        units=str(folder / "units.json"), shards=2, size_bytes=123_456, pods=2, classes_per_image=3,
        failed={"no label": 1}, failures=[BadSample(shard=SCRIPT, key=HANDLER, reason="no label")],
        notes=["classes_per_image 10 clamped to the 4 classes there are"],
        run={"name": "fruit", "labeled": [f"{SCRIPT}.tar"], "seed": 0},
    )  # fmt: skip


def make_score_receipt(folder: Path, pod: int) -> ScoreReceipt:
    """Return the receipt of a pod.

    Pod 0 took longest and waited for its device. Pod 1 waited for its CPUs.
    """
    return ScoreReceipt(
        stage="score", digest=f"pod{pod}", folder=str(folder / "scores"), seconds=(12.25, 8.25)[pod], pod=pod,
        teacher="t", units=1, units_found=pod, listed=16, scored=15, failed={"damaged image": 1},
        clocks=PartSeconds(read=1, decode=30, forward=8, write=0.5), slowest=("forward", "decode")[pod],
    )  # fmt: skip


def make_selection_receipt(folder: Path) -> SelectionReceipt:
    """Return the receipt of the merge, in which two of four classes are short."""
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


def make_evaluation_receipt(student: float = 0.715, pretrained: float = 0.725) -> EvaluationReceipt:
    """Return the receipt of the evaluation for these accuracies of two models."""
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
        comparisons=[make_comparison(name, student - value) for name, value in top1.items() if name != "student"],
        confusion=ConfusionMatrix(
            classes=CLASSES, counts=[[290, 10, 0, 0], [1, 299, 0, 0], [50, 50, 200, 0], [0, 0, 0, 300]]
        ),
    )  # fmt: skip


def make_comparison(name: str, difference: float) -> PairedComparison:
    """Return the comparison of the student with another model."""
    return PairedComparison(
        model="student", against=name, wins=60, losses=21, difference=round(difference, 4),
        interval=(difference - 0.01, difference + 0.01), p_value=0.00002, p_worse=0.99999,
    )  # fmt: skip


def make_promotion_receipt(promoted: bool = True) -> PromotionReceipt:
    """Return the receipt of the promotion, with a hostile reason."""
    return PromotionReceipt(
        stage="promote", digest="d", folder="fruit", seconds=0.1, champion="champions/fruit.json", model="f",
        promoted=promoted, why=f"not worse than the champion: {SCRIPT}",
        comparison=make_comparison("champion", 0.004),
    )  # fmt: skip


def make_group_receipt(group: ShardGroup) -> ShardGroupReceipt:
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
    write_selection(folder / "selection.parquet", make_selection_rows(shards))
    group = ShardGroup(digest="unit0", shards=shards)
    (folder / "units.json").write_text(json.dumps([group.model_dump()]))
    (folder / "scores" / group.digest).mkdir(parents=True)
    (folder / "scores" / group.digest / "receipt.json").write_text(make_group_receipt(group).model_dump_json())
    return {
        "plan": [make_plan_receipt(folder)],
        "teacher": [make_train_receipt("teacher", 0.1, 20, 100_000, 0.75)],
        "baselines": [
            make_train_receipt("baseline", rate, 30.5, 250_000, 0.7 - abs(rate - 0.1)) for rate in (0.05, 0.1, 0.2)
        ],
        "scores": [make_score_receipt(folder, 0), make_score_receipt(folder, 1)],
        "selection": [make_selection_receipt(folder)],
        "packed": [
            PackReceipt(
                stage="pack", digest="k", folder="pack", seconds=0.75, shards="", tars=1, samples=29,
                class_counts=SELECTED_COUNTS, size_bytes=40_000,
            )
        ],
        "pretrained": [make_train_receipt("pretrain", 0.1, 25, 220_000, 0.71)],
        "students": [make_train_receipt("finetune", rate, 5.5, 30_000, 0.72 - rate) for rate in (0.0025, 0.00025)],
        "evaluation": [make_evaluation_receipt()],
        "promotion": [make_promotion_receipt()],
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
    """Return the HTML of a report."""
    return Path(receipt.report).read_text()
