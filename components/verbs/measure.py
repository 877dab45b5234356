"""Measure: one trained model on a run file's test set, by the evaluation's measures."""

from pathlib import Path

from components.evaluate.measure import measure_one
from components.plan.plan import PlanConfig
from components.plan.plan import plan as plan_stage
from components.shared import runfile, storage
from components.shared.checkpoints import refuse_other_classes
from components.shared.predictions import Exam
from components.shared.progress import Progress
from components.shared.receipts import Interval, Measurement, PlanReceipt, TrainReceipt
from components.shared.runfile import RunFile
from components.shared.shards import Columns
from components.shared.wording import one_line
from components.verbs.run import shown
from components.verbs.trained import trained

LISTED = 10  # of the classes, the lowest first; the file has all


def measure(path: Path, source: str, model: str) -> None:
    """Measure one trained model on a run file's test set: top-1, top-5, calibration, each class, with 95% intervals.

    Its classes must be the labeled set's. The pool is not looked at.
    """
    settings, receipt = runfile.load(path).located(), trained(source, model)
    measure_on(settings, planned(settings), receipt)


def planned(settings: RunFile) -> PlanReceipt:
    """Plan a run file's labeled sets, or find them planned."""
    return plan_stage(PlanConfig.model_validate(settings.parameters()), with_pool=False)


def measure_on(settings: RunFile, plan: PlanReceipt, receipt: TrainReceipt) -> None:
    """Measure a model on the planned test set, and print and keep what came of it."""
    refuse_other_classes(receipt.checkpoint, receipt.classes, plan.classes)
    columns = Columns(settings.image_column, settings.label_column, plan.videos)
    measured = measure_one(Exam(settings.workdir, plan.test, columns, Progress("measure", plan.test.samples)), receipt)
    uri = storage.join(settings.workdir, settings.name, "measured", f"{receipt.digest}.json")
    storage.write(uri, measured.model_dump_json(indent=1).encode())
    print("\n".join([*table(measured, receipt), f"measured: {shown(uri)}"]))


def table(measured: Measurement, receipt: TrainReceipt) -> list[str]:
    """Say how good a model is."""
    one = measured.model
    by_class = sorted(
        zip(measured.per_class, measured.per_class_intervals, measured.classes, strict=True), key=lambda row: row[0]
    )
    listed = by_class[:LISTED]
    return [
        f"\n{receipt.network}, {receipt.recipe}, on {one.images:,} test images of {len(measured.classes):,} classes",
        line("top-1", one.top1, one.top1_interval),
        line("top-5", one.top5, one.top5_interval),
        line("calibration error", one.calibration_error, one.calibration_error_interval),
        f"top-1 by class, the lowest {len(listed)} of {len(by_class):,}:",
        *(line(f"  {name}", share, interval) for share, interval, name in listed),
    ]


def line(name: str, value: float, interval: Interval) -> str:
    """Write a share and what covers 95% of it."""
    return f"{one_line(name):30}{value:8.2%}  ({interval[0]:.2%} to {interval[1]:.2%})"
