"""Summarize receipts as Markdown and as named numbers for the Kubeflow UI."""

from collections.abc import Iterable, Sequence
from functools import singledispatch

from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import EvaluationReceipt, has_top5
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.score import ScoreReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.receipts.validation_warnings import small_validation_warning

# Rows of the table of short classes.
MAX_ROWS = 20


def escape_markdown(text: str) -> str:
    """Escape text for Markdown and HTML.

    Class names and file names come from the input data, so they are not trusted.
    """
    return "".join(
        character if character.isalnum() or character in " .,:;/-" else f"&#{ord(character)};" for character in text
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        head: Titles of the columns.
        rows: Cells of each row. They are not escaped here.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@singledispatch
def summarize(receipt: Receipt) -> str:
    """Summarize what a stage did, in Markdown.

    Raises:
        TypeError: No summary is defined for receipts of this type.
    """
    raise TypeError(f"no summary of a {type(receipt).__name__}")


@summarize.register
def _summarize_plan(receipt: PlanReceipt) -> str:
    sets = {"labeled": receipt.train, "validation": receipt.validation, "test": receipt.test}
    counts = markdown_table(["set", "images"], [[name, f"{split.samples:,}"] for name, split in sets.items()])
    pool = f"Unlabeled: {receipt.shards:,} shards, {receipt.size_bytes:,} bytes, for at most {receipt.pods} pods.\n"
    failed = [f"- not used: {count:,} × {escape_markdown(reason)}" for reason, count in receipt.failed.items()]
    warnings = [warning] if (warning := small_validation_warning(receipt)) else []
    notes = [f"- {escape_markdown(note)}" for note in [*warnings, *receipt.notes]]
    return f"{len(receipt.classes):,} classes\n\n{counts}\n{pool}\n" + "\n".join([*notes, *failed]) + "\n"


@summarize.register
def _summarize_fanout(receipt: FanoutReceipt) -> str:
    return f"{escape_markdown(receipt.why)}\n"


@summarize.register
def _summarize_training(receipt: TrainReceipt) -> str:
    facts = {
        "recipe": escape_markdown(receipt.recipe),
        "architecture": f"{escape_markdown(receipt.model_label)}, {receipt.parameters:,} parameters",
        "images processed": f"{receipt.images_processed:,}, of {receipt.samples:,} different ones",
        "learning rate": f"{receipt.learning_rate:g} for 256 images",
        "validation top-1": f"**{receipt.validation_top1:.2%}**",
        "speed": f"{receipt.images_per_s:,.0f} images/s",
    }
    validated = [point for point in receipt.curve if point.validation_top1 is not None]
    curve = [
        [
            f"{point.images_processed:,}",
            f"{point.learning_rate:.3g}",
            f"{point.loss:.4f}",
            f"{point.validation_top1:.2%}",
        ]
        for point in validated
    ]
    head = ["images processed", "learning rate", "loss", "validation top-1"]
    return f"{markdown_table(['', ''], facts.items())}\n{markdown_table(head, curve)}"


@summarize.register
def _summarize_scores(receipt: ScoreReceipt) -> str:
    counts = markdown_table(
        ["", ""],
        [
            ["images scored", f"**{receipt.scored:,}** of {receipt.listed:,}"],
            ["shard groups", f"{receipt.units:,}, of which {receipt.units_found:,} were already scored"],
            ["speed", f"{receipt.scored / receipt.seconds:,.0f} images/s" if receipt.seconds else "no image is new"],
        ],
    )
    part_rows = [
        [f"**{part}**, the slowest: the others waited for it" if part == receipt.slowest else part, f"{seconds:,.1f}"]
        for part, seconds in receipt.clocks.model_dump().items()
    ]
    clocks = markdown_table(["part", "thread-seconds"], part_rows)
    failed = [f"- failed: {count:,} × {escape_markdown(reason)}" for reason, count in receipt.failed.items()]
    return f"{counts}\n{clocks}\n" + "\n".join([*failed, ""])


@summarize.register
def _summarize_selection(receipt: SelectionReceipt) -> str:
    accounting = receipt.ledger
    short_classes = [stats for stats in receipt.per_class if stats.found < stats.wanted]
    lines = [
        f"**{receipt.images:,}** images selected, {receipt.unique_images:,} different, for {len(receipt.per_class):,} "
        f"classes; K = {receipt.images_per_class:,}, P = {receipt.classes_per_image}",
        f"{accounting.listed:,} listed = {accounting.scored:,} scored + {accounting.failed:,} failed + "
        f"{accounting.removed:,} removed",
    ]
    if receipt.removal and receipt.removal.unmatched:
        lines.append(escape_markdown(receipt.removal.warning()))
    if receipt.renewal:
        decision = "too little: the earlier selection is kept" if receipt.renewal.kept else "trained anew"
        lines.append(
            f"{receipt.renewal.changed:.2%} changed since it was last trained on; `retrain_above` is "
            f"{receipt.renewal.retrain_above:.2%}: **{decision}**"
        )
    text = "\n\n".join(lines) + "\n"
    if not short_classes:
        return text
    rows = [
        [escape_markdown(stats.name), f"{stats.found:,}", f"{stats.wanted:,}"] for stats in short_classes[:MAX_ROWS]
    ]
    return f"{text}\n{len(short_classes):,} classes are short:\n\n{markdown_table(['class', 'found', 'wanted'], rows)}"


@summarize.register
def _summarize_pack(receipt: PackReceipt) -> str:
    return f"{receipt.samples:,} images in {receipt.tars:,} shuffled tars, {receipt.size_bytes:,} bytes\n"


@summarize.register
def _summarize_evaluation(receipt: EvaluationReceipt) -> str:
    with_top5 = has_top5(len(receipt.confusion.classes))
    models = [
        [
            name,
            f"**{model.top1:.2%}**",
            f"{model.top1_interval[0]:.2%} to {model.top1_interval[1]:.2%}",
            *([f"{model.top5:.2%}"] if with_top5 else []),
            f"{model.calibration_error:.2%}",
            f"{model.learning_rate:g}",
        ]
        for name, model in receipt.models.items()
    ]
    pairs = [
        [
            f"student − {comparison.against}",
            f"{100 * comparison.difference:+.2f}",
            f"{100 * comparison.interval[0]:+.2f} to {100 * comparison.interval[1]:+.2f}",
            f"{comparison.wins:,} / {comparison.losses:,}",
            f"{comparison.p_value:.3g}",
        ]
        for comparison in receipt.comparisons
    ]
    images = receipt.models["student"].images
    return (
        f"Measured on the same {images:,} test images. Intervals cover 95%. Learning rates were chosen on the "
        "validation images. The test images decide on promotion.\n\n"
        + markdown_table(
            ["model", "top-1", "interval", *(["top-5"] if with_top5 else []), "calibration error", "learning rate"],
            models,
        )
        + "\n"
        + markdown_table(
            ["difference", "points of top-1", "interval", "images won / lost", "p (McNemar, two-sided)"], pairs
        )
    )


@summarize.register
def _summarize_promotion(receipt: PromotionReceipt) -> str:
    decision = "**The student is the champion now**" if receipt.promoted else "**The champion stays**"
    return f"{decision}: {escape_markdown(receipt.why)}\n\n`{escape_markdown(receipt.champion)}`\n"


def evaluation_scalars(receipt: EvaluationReceipt) -> dict[str, float]:
    """Return the metrics that Kubeflow lists when it compares runs.

    Returns:
        Numbers by name. Accuracies are in percent, and the gain over the baseline is in points.
    """
    scalars = {}
    for name, model in receipt.models.items():
        scalars[f"{name} top-1 (%)"] = round(100 * model.top1, 3)
        scalars[f"{name} top-5 (%)"] = round(100 * model.top5, 3)
        scalars[f"{name} calibration error"] = round(model.calibration_error, 5)
    gain = next(comparison for comparison in receipt.comparisons if comparison.against == "baseline")
    scalars["gain over the baseline (points)"] = round(100 * gain.difference, 3)
    scalars["gain over the baseline, p (McNemar)"] = round(gain.p_value, 6)
    return scalars
