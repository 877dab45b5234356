"""Measure: one trained model on a run file's test set, by the evaluation's measures."""

from pathlib import Path

from semiscale import storage
from semiscale.cli.model_source import resolve_model
from semiscale.cli.run_local import display_path
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.data.shard import SampleFields
from semiscale.evaluation.prediction_cache import SplitEvaluator
from semiscale.models.checkpoint_metadata import check_same_classes
from semiscale.observability.progress import Progress
from semiscale.receipts.evaluate import Interval, ModelEvaluation
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.evaluate.evaluate_models import evaluate_model
from semiscale.stages.plan.stage import PlanConfig
from semiscale.stages.plan.stage import plan as plan_stage

MAX_CLASSES_SHOWN = 10  # of the classes, the lowest first; the file has all


def measure(path: Path, source: str, model: str) -> None:
    """Measure one trained model on a run file's test set: top-1, top-5, calibration, each class, with 95% intervals.

    Its classes must be the labeled set's. The pool is not looked at.
    """
    settings, receipt = run_config.load_run_config(path).with_absolute_uris(), resolve_model(source, model)
    evaluate_and_store(settings, ensure_plan(settings), receipt)


def ensure_plan(settings: RunConfig) -> PlanReceipt:
    """Plan a run file's labeled sets, or find them planned."""
    return plan_stage(PlanConfig.model_validate(settings.parameters()), with_pool=False)


def evaluate_and_store(settings: RunConfig, plan: PlanReceipt, receipt: TrainReceipt) -> None:
    """Measure a model on the planned test set, and print and keep what came of it."""
    check_same_classes(receipt.checkpoint, receipt.classes, plan.classes)
    columns = SampleFields(settings.image_column, settings.label_column, plan.is_video)
    measured = evaluate_model(
        SplitEvaluator(settings.workdir, plan.test, columns, Progress("measure", plan.test.samples)), receipt
    )
    uri = storage.join(settings.workdir, settings.name, "measured", f"{receipt.digest}.json")
    storage.write_bytes(uri, measured.model_dump_json(indent=1).encode())
    print("\n".join([*format_table(measured, receipt), f"measured: {display_path(uri)}"]))


def format_table(measured: ModelEvaluation, receipt: TrainReceipt) -> list[str]:
    """Say how good a model is."""
    one = measured.model
    by_class = sorted(
        zip(measured.per_class, measured.per_class_intervals, measured.classes, strict=True), key=lambda row: row[0]
    )
    listed = by_class[:MAX_CLASSES_SHOWN]
    return [
        f"\n{receipt.model_label}, {receipt.recipe}, on {one.images:,} test images of "
        f"{len(measured.classes):,} classes",
        format_row("top-1", one.top1, one.top1_interval),
        format_row("top-5", one.top5, one.top5_interval),
        format_row("calibration error", one.calibration_error, one.calibration_error_interval),
        f"top-1 by class, the lowest {len(listed)} of {len(by_class):,}:",
        *(format_row(f"  {name}", share, interval) for share, interval, name in listed),
    ]


def format_row(name: str, value: float, interval: Interval) -> str:
    """Write a share and what covers 95% of it."""
    return f"{to_single_line(name):30}{value:8.2%}  ({interval[0]:.2%} to {interval[1]:.2%})"
