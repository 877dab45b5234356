"""Derive the content of each section of the page from the receipts.

The template decides how it looks. Fractions and seconds stay numbers here, and the template's filters format them
(number_format.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from semiscale.receipts.evaluate import Interval, PairedComparison
from semiscale.receipts.merge import ClassSelectionStats, SelectionReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.report.charts import Chart, Points, Series, chart, log_scale, loss_scale, percent_scale
from semiscale.stages.report.number_format import format_learning_rate, number
from semiscale.stages.report.run_receipts import RunReceipts

MODELS = {
    "teacher": "Teacher",
    "baseline": "Baseline",
    "pretrained": "Student before fine-tuning",
    "student": "Student after fine-tuning",
}
STAGES = {
    "plan": "Plan",
    "teacher": "Train the teacher",
    "baseline": "Train the baselines",
    "score": "Score the pool",
    "merge": "Merge",
    "pack": "Pack",
    "pretrain": "Pre-train the student",
    "finetune": "Fine-tune the students",
    "evaluate": "Evaluate",
}
SCORING_PARTS = {
    "read": ("Reading", "A faster store, or more pods, would shorten scoring"),
    "decode": ("Decoding", "More CPU cores would shorten scoring"),
    "forward": ("Forward pass", "A faster accelerator, or one more, would shorten scoring"),
    "write": ("Writing", "A faster store would shorten scoring"),
}
MAX_SHORT_CLASSES_LISTED = 10


@dataclass(frozen=True)
class ModelRow:
    """A line of the result table. Accuracies are fractions.

    `interval` covers 95% of the test top-1 under resampled images.
    """

    style: str
    name: str
    architecture: str
    parameters: int
    images_processed: int
    parts: str
    learning_rate: float
    validation_top1: float
    top1: float
    top5: float
    calibration_error: float
    interval: Interval


@dataclass(frozen=True)
class Gains:
    """The student's test top-1, its gains, and its comparison with each other model.

    All are fractions.
    """

    images: int
    top1: float
    over_baseline: float
    by_finetuning: float
    compared: list[tuple[str, PairedComparison]]


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix: images, share of the row, and correctness."""

    images: int
    share: float
    right: bool


@dataclass(frozen=True)
class Bar:
    """A bar: a value in seconds, its share of the longest, and its share of the whole.

    Both shares are in [0, 1].
    """

    name: str
    seconds: float
    share: float
    of_whole: float


@dataclass(frozen=True)
class Panel:
    """A row of charts with one legend."""

    title: str
    note: str
    legend: list[Series]
    charts: list[Chart]


@dataclass(frozen=True)
class Sweep:
    """The learning rates that were tried for one model, in order, and advice."""

    name: str
    receipts: list[TrainReceipt]
    chosen: str
    advice: str


@dataclass(frozen=True)
class ClassRow:
    """A class: test images, top-1 and interval by model, and the student's gain.

    The gain is over the baseline.
    """

    name: str
    images: int
    top1: list[tuple[float, Interval]]
    gain: float


def model_rows(run: RunReceipts) -> list[ModelRow]:
    """Describe the four evaluated models. The student's images include its pre-training."""
    rows = []
    for name, receipt in run.evaluated_models().items():
        accuracy = run.evaluation.models[name]
        before = run.pretrained.images_processed if name == "student" else 0
        parts = f"{number(before)} + {number(receipt.images_processed)}" if before else ""
        row = ModelRow(
            style=name,
            name=MODELS[name],
            architecture=receipt.model_label,
            parameters=receipt.parameters,
            images_processed=before + receipt.images_processed,
            parts=parts,
            learning_rate=receipt.learning_rate,
            validation_top1=receipt.validation_top1,
            top1=accuracy.top1,
            top5=accuracy.top5,
            calibration_error=accuracy.calibration_error,
            interval=accuracy.top1_interval,
        )
        rows.append(row)
    return rows


def student_gains(run: RunReceipts) -> Gains:
    """Compare the student with the other models and the champion on the test set."""
    models = run.evaluation.models
    student = models["student"]
    compared = [(MODELS[comparison.against], comparison) for comparison in run.evaluation.comparisons]
    if run.promotion.comparison and run.promotion.comparison.against == "champion":
        compared.append(("Champion", run.promotion.comparison))
    return Gains(
        images=student.images,
        top1=student.top1,
        over_baseline=student.top1 - models["baseline"].top1,
        by_finetuning=student.top1 - models["pretrained"].top1,
        compared=compared,
    )


def confusion_rows(run: RunReceipts) -> list[tuple[str, list[Cell]]]:
    """Return the rows of the student's confusion matrix, each with the name of its class."""
    classes, counts = run.evaluation.confusion.classes, run.evaluation.confusion.counts
    return [
        (name, [Cell(images, images / max(sum(row), 1), predicted == label) for predicted, images in enumerate(row)])
        for label, (name, row) in enumerate(zip(classes, counts, strict=True))
    ]


def short_classes(selection: SelectionReceipt) -> list[ClassSelectionStats]:
    """Return the classes with fewer images than requested, the smallest first."""
    short = [stats for stats in selection.per_class if stats.found < stats.wanted]
    return sorted(short, key=lambda stats: stats.found)


def training_panels(run: RunReceipts) -> list[Panel]:
    """Draw the four trainings on common axes, and the short fine-tunings on their own."""
    evaluated = run.evaluated_models()
    # The student continues where its pre-training ended.
    offsets = {name: run.pretrained.images_processed if name == "student" else 0 for name in evaluated}
    # A ready-made teacher has no curve.
    together = [(MODELS[name], name, receipt, offsets[name]) for name, receipt in evaluated.items() if receipt.curve]
    chosen = evaluated["student"].digest
    # The chosen fine-tuning comes last, so that it is drawn over the others.
    in_order = sorted(run.students, key=lambda receipt: (receipt.digest == chosen, receipt.learning_rate))
    alone = [
        (
            f"learning rate {format_learning_rate(receipt.learning_rate)}",
            _sweep_style(number, receipt.digest == chosen),
            receipt,
            0,
        )
        for number, receipt in enumerate(in_order)
    ]
    note = "The student’s fine-tuning continues where its pre-training ends. Of a sweep, the chosen learning rate."
    zoom = "The same fine-tuning with each learning rate of the sweep; the chosen one is coloured."
    return [_panel("The four models", note, together), _panel("Fine-tuning, enlarged", zoom, alone)]


def sweeps(run: RunReceipts) -> list[Sweep]:
    """List the learning rates tried for the baseline and the fine-tuning."""
    evaluated = run.evaluated_models()
    return [
        _sweep("Baseline", run.baselines, evaluated["baseline"]),
        _sweep("Fine-tuning of the student", run.students, evaluated["student"]),
    ]


def stage_time_bars(run: RunReceipts) -> list[Bar]:
    """Return the time of each stage."""
    return _bars({STAGES[stage]: seconds for stage, seconds in run.seconds().items()})


def part_time_bars(run: RunReceipts) -> list[Bar]:
    """Return the time of each part of scoring, in thread-seconds."""
    return _bars({SCORING_PARTS[part][0]: seconds for part, seconds in run.part_seconds().items()})


def bottleneck_advice(run: RunReceipts) -> str:
    """Name the slowest part of scoring and the remedy, or "" if nothing was scored."""
    part = run.bottleneck()
    if not part:
        return ""
    name, remedy = SCORING_PARTS[part]
    return f"Slowest part: {name.lower()}. {remedy}."


def class_rows(run: RunReceipts) -> list[ClassRow]:
    """Return the per-class accuracies on the test set, in label order."""
    evaluation = run.evaluation
    columns = [
        list(zip(evaluation.per_class[name], evaluation.per_class_intervals[name], strict=True)) for name in MODELS
    ]
    by_class = zip(run.plan.classes, run.plan.test.class_counts, zip(*columns, strict=True), strict=True)
    return [ClassRow(name, images, list(top1), top1[3][0] - top1[1][0]) for name, images, top1 in by_class]


def _bars(seconds: Mapping[str, float]) -> list[Bar]:
    longest, whole = max(seconds.values()) or 1, sum(seconds.values()) or 1
    return [Bar(name, spent, spent / longest, spent / whole) for name, spent in seconds.items()]


def _sweep_style(number: int, chosen: bool) -> str:
    return "student" if chosen else f"other other-{number % 3}"


def _panel(title: str, note: str, trainings: list[tuple[str, str, TrainReceipt, int]]) -> Panel:
    """Draw loss, validation top-1 and learning rate of trainings.

    A training is (name, style, receipt, images processed before it).
    """

    def lines(points: str) -> list[Series]:
        return [Series(name, style, _points(receipt, points, before)) for name, style, receipt, before in trainings]

    charts = [
        chart("Training loss", lines("loss"), loss_scale),
        chart("Validation top-1", lines("validation_top1"), percent_scale),
        chart("Learning rate", lines("learning_rate"), log_scale),
    ]
    return Panel(title, note, lines("loss"), charts)


def _points(receipt: TrainReceipt, value: str, before: int) -> Points:
    curve = [(before + point.images_processed, getattr(point, value)) for point in receipt.curve]
    return [(images, y) for images, y in curve if y is not None]


def _sweep(name: str, receipts: list[TrainReceipt], chosen: TrainReceipt) -> Sweep:
    by_rate = sorted(receipts, key=lambda receipt: receipt.learning_rate)
    position = [receipt.digest for receipt in by_rate].index(chosen.digest)
    advice = ""
    tied = [receipt for receipt in by_rate if receipt.validation_top1 == chosen.validation_top1]
    if len(by_rate) == 1:
        advice = "Only one learning rate was tried."
    elif len(tied) > 1:
        which = "The smallest of them" if tied[0].digest == chosen.digest else "One of them"
        advice = f"{len(tied)} learning rates had the same validation top-1. {which} was chosen."
    elif position in (0, len(by_rate) - 1):
        side = "smallest" if position == 0 else "largest"
        beyond = "smaller" if position == 0 else "larger"
        advice = f"The chosen learning rate is the {side} that was tried: a {beyond} one may be even better."
    return Sweep(name, by_rate, chosen.digest, advice)
