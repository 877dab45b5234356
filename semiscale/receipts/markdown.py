"""Summarize receipts as Markdown and as named numbers for the Kubeflow UI."""

from collections.abc import Iterable, Sequence
from functools import singledispatch

from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.score import ScoreReceipt
from semiscale.receipts.train import TrainReceipt

MAX_ROWS = 20  # lines of a table or a list


def escape_markdown(text: str) -> str:
    """Return text that stays text in Markdown and in HTML: class names and file names are not ours."""
    return "".join(one if one.isalnum() or one in " .,:;/-" else f"&#{ord(one)};" for one in text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are safe."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@singledispatch
def summarize(receipt: Receipt) -> str:
    """Say what a stage did."""
    raise TypeError(f"no summary of a {type(receipt).__name__}")


@summarize.register
def _plan(receipt: PlanReceipt) -> str:
    sets = {"labeled": receipt.train, "validation": receipt.validation, "test": receipt.test}
    counts = markdown_table(["set", "images"], [[name, f"{split.samples:,}"] for name, split in sets.items()])
    pool = f"Unlabeled: {receipt.shards:,} shards, {receipt.size_bytes:,} bytes, for at most {receipt.pods} pods.\n"
    failed = [f"- not used: {count:,} × {escape_markdown(reason)}" for reason, count in receipt.failed.items()]
    notes = [f"- {escape_markdown(note)}" for note in receipt.notes]
    return f"{len(receipt.classes):,} classes\n\n{counts}\n{pool}\n" + "\n".join([*notes, *failed]) + "\n"


@summarize.register
def _count(receipt: FanoutReceipt) -> str:
    return f"{escape_markdown(receipt.why)}\n"


@summarize.register
def _train(receipt: TrainReceipt) -> str:
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
def _scores(receipt: ScoreReceipt) -> str:
    counts = markdown_table(
        ["", ""],
        [
            ["images scored", f"**{receipt.scored:,}** of {receipt.listed:,}"],
            ["units", f"{receipt.units:,}, of which {receipt.units_found:,} were there already"],
            ["speed", f"{receipt.scored / receipt.seconds:,.0f} images/s" if receipt.seconds else "no image is new"],
        ],
    )
    spent = [
        [f"**{part}**, the slowest: the others waited for it" if part == receipt.slowest else part, f"{one:,.1f}"]
        for part, one in receipt.clocks.model_dump().items()
    ]
    clocks = markdown_table(["part", "thread-seconds"], spent)
    failed = [f"- failed: {count:,} × {escape_markdown(reason)}" for reason, count in receipt.failed.items()]
    return f"{counts}\n{clocks}\n" + "\n".join([*failed, ""])


@summarize.register
def _selection(receipt: SelectionReceipt) -> str:
    ledger = receipt.ledger
    short = [one for one in receipt.per_class if one.found < one.wanted]
    lines = [
        f"**{receipt.images:,}** images selected, {receipt.unique_images:,} different, for {len(receipt.per_class):,} "
        f"classes; K = {receipt.images_per_class:,}, P = {receipt.classes_per_image}",
        f"{ledger.listed:,} listed = {ledger.scored:,} scored + {ledger.failed:,} failed + {ledger.removed:,} removed",
    ]
    if receipt.removal and receipt.removal.unmatched:
        lines.append(escape_markdown(receipt.removal.warning()))
    if receipt.renewal:
        renewed = "too little: the earlier selection is kept" if receipt.renewal.kept else "trained anew"
        lines.append(
            f"{receipt.renewal.changed:.2%} changed since it was last trained on; `retrain_above` is "
            f"{receipt.renewal.retrain_above:.2%}: **{renewed}**"
        )
    text = "\n\n".join(lines) + "\n"
    if not short:
        return text
    rows = [[escape_markdown(one.name), f"{one.found:,}", f"{one.wanted:,}"] for one in short[:MAX_ROWS]]
    return f"{text}\n{len(short):,} classes are short:\n\n{markdown_table(['class', 'found', 'wanted'], rows)}"


@summarize.register
def _packed(receipt: PackReceipt) -> str:
    return f"{receipt.samples:,} images in {receipt.tars:,} shuffled tars, {receipt.size_bytes:,} bytes\n"


@summarize.register
def _evaluation(receipt: EvaluationReceipt) -> str:
    models = [
        [
            name,
            f"**{one.top1:.2%}**",
            f"{one.top1_interval[0]:.2%} to {one.top1_interval[1]:.2%}",
            f"{one.top5:.2%}",
            f"{one.calibration_error:.4f}",
            f"{one.learning_rate:g}",
        ]
        for name, one in receipt.models.items()
    ]
    pairs = [
        [
            f"student − {one.against}",
            f"{100 * one.difference:+.2f}",
            f"{100 * one.interval[0]:+.2f} to {100 * one.interval[1]:+.2f}",
            f"{one.wins:,} / {one.losses:,}",
            f"{one.p_value:.3g}",
        ]
        for one in receipt.comparisons
    ]
    images = receipt.models["student"].images
    return (
        f"On the same {images:,} test images, which chose nothing; intervals cover 95%.\n\n"
        + markdown_table(["model", "top-1", "interval", "top-5", "calibration error", "learning rate"], models)
        + "\n"
        + markdown_table(["difference", "points of top-1", "interval", "images won / lost", "p (McNemar)"], pairs)
    )


@summarize.register
def _promotion(receipt: PromotionReceipt) -> str:
    decided = "**The student is the champion now**" if receipt.promoted else "**The champion stays**"
    return f"{decided}: {escape_markdown(receipt.why)}\n\n`{escape_markdown(receipt.champion)}`\n"


def evaluation_scalars(receipt: EvaluationReceipt) -> dict[str, float]:
    """Return an evaluation's numbers by the names that a comparison of runs shows them under; percent, points."""
    measured = {}
    for name, one in receipt.models.items():
        measured[f"{name} top-1 (%)"] = round(100 * one.top1, 3)
        measured[f"{name} top-5 (%)"] = round(100 * one.top5, 3)
        measured[f"{name} calibration error"] = round(one.calibration_error, 5)
    gain = next(one for one in receipt.comparisons if one.against == "baseline")
    measured["gain over the baseline (points)"] = round(100 * gain.difference, 3)
    measured["gain over the baseline, p (McNemar)"] = round(gain.p_value, 6)
    return measured
