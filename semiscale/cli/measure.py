"""The verb `measure`: measure one trained model on the test set of a run file."""

import argparse
from pathlib import Path

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.model_source import MODEL_NAMES, SOURCE_HELP, resolve_model
from semiscale.cli.run import display_path
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.data.shard import SampleFields
from semiscale.evaluation.prediction_cache import SplitEvaluator
from semiscale.models.checkpoint_metadata import check_same_classes
from semiscale.observability.progress import Progress
from semiscale.receipts.evaluate import Interval, ModelEvaluation, has_top5
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.evaluate.evaluate_models import evaluate_model
from semiscale.stages.plan.stage import PlanConfig
from semiscale.stages.plan.stage import plan as plan_stage

# The classes of the lowest accuracy are printed. The stored file has all of them.
MAX_CLASSES_SHOWN = 10


def measure(path: Path, source: str, model: str) -> None:
    """Measure one trained model on the test set of a run file, print the result and store it.

    Args:
        path: The run file.
        source: The trained model: a run file, a receipt of a training or a checkpoint.
        model: Which model of the finished run, if the source is a run file.

    Raises:
        InvalidInputError: There is no such model, or its classes are not those of the labeled set.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    receipt = resolve_model(source, model)
    evaluate_and_store(settings, ensure_plan(settings), receipt)


def ensure_plan(settings: RunConfig) -> PlanReceipt:
    """Plan the labeled sets of a run file, or load the finished plan."""
    return plan_stage(PlanConfig.model_validate(settings.parameters()), with_pool=False)


def evaluate_and_store(settings: RunConfig, plan: PlanReceipt, receipt: TrainReceipt) -> None:
    """Measure a model on the planned test set, print the result and store it.

    Args:
        settings: The run file.
        plan: Receipt of its plan.
        receipt: Receipt of the training of the model.

    Raises:
        InvalidInputError: The classes of the model are not those of the plan.
    """
    check_same_classes(receipt.checkpoint, receipt.classes, plan.classes)
    columns = SampleFields(settings.image_column, settings.label_column, plan.is_video)
    measured = evaluate_model(
        SplitEvaluator(settings.workdir, plan.test, columns, Progress("measure", plan.test.samples)), receipt
    )
    uri = storage.join(settings.workdir, settings.name, "measured", f"{receipt.digest}.json")
    storage.write_bytes(uri, measured.model_dump_json(indent=1).encode())
    print("\n".join([*format_measurement_table(measured, receipt), f"measured: {display_path(uri)}"]))


def format_measurement_table(measured: ModelEvaluation, receipt: TrainReceipt) -> list[str]:
    """Return the lines that describe the accuracy of a model."""
    scores = measured.model
    by_class = sorted(
        zip(measured.per_class, measured.per_class_intervals, measured.classes, strict=True), key=lambda row: row[0]
    )
    lowest = by_class[:MAX_CLASSES_SHOWN]
    return [
        f"\n{receipt.model_label}, {receipt.recipe}, on {scores.images:,} test images of "
        f"{len(measured.classes):,} classes",
        format_measurement_row("top-1", scores.top1, scores.top1_interval),
        *(
            [format_measurement_row("top-5", scores.top5, scores.top5_interval)]
            if has_top5(len(measured.classes))
            else []
        ),
        format_measurement_row("calibration error", scores.calibration_error, scores.calibration_error_interval),
        f"top-1 by class, the lowest {len(lowest)} of {len(by_class):,}:",
        *(format_measurement_row(f"  {name}", share, interval) for share, interval, name in lowest),
    ]


def format_measurement_row(name: str, value: float, interval: Interval) -> str:
    """Format a share with its 95% interval."""
    return f"{to_single_line(name):30}{value:8.2%}  ({interval[0]:.2%} to {interval[1]:.2%})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `measure`."""
    parser.add_argument("run_file", type=Path, help="whose test set and classes")
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument("--model", choices=MODEL_NAMES, default="student", help="which one of the finished run's")


def execute(options: Options) -> None:
    """Run the verb."""
    measure(options.run_file, options.source, options.model)


COMMAND = Command(
    help="one trained model on a run file's test set",
    description="Measure one trained model on a run file's test set: top-1, top-5, calibration and each class, with\n"
    "95% intervals.\n\n"
    "The classes of the model must be those of the labeled set. The pool is not read.",
    examples=("my-run.yaml other-run.yaml --model baseline", "my-run.yaml s3://bucket/model.safetensors"),
    add_arguments=add_arguments,
    execute=execute,
)
