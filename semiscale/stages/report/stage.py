"""Report a run as one HTML page for people and one JSON file for programs."""

import json
import time
from dataclasses import fields
from typing import ClassVar

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data.shard import SampleFields
from semiscale.observability.progress import log_info
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.report import ReportReceipt
from semiscale.receipts.score import ScoreReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.receipts.validation_warnings import validation_warnings
from semiscale.runtime.stage_config import ReceiptUri, ReceiptUris, StageConfig
from semiscale.stages.report.failure_examples import failure_examples
from semiscale.stages.report.gallery import build_gallery
from semiscale.stages.report.page_header import load_page_header
from semiscale.stages.report.render import render
from semiscale.stages.report.run_receipts import RunReceipts
from semiscale.storage.documents import load_document

METRIC_FIELDS = {"top1", "top5", "calibration_error", "top1_interval", "top5_interval", "calibration_error_interval"}


class ReportConfig(StageConfig):
    """The receipts of the run, and the column of the gallery's images."""

    stage: ClassVar[str] = "report"

    plan: ReceiptUri
    """The plan's receipt."""
    teacher: ReceiptUri
    """The teacher's receipt."""
    baselines: ReceiptUris
    """The receipts of the baseline at every learning rate."""
    scores: ReceiptUris
    """The receipts of all scoring pods."""
    selection: ReceiptUri
    """The merge's receipt."""
    packed: ReceiptUri
    """The pack stage's receipt."""
    pretrained: ReceiptUri
    """The receipt of the student before fine-tuning."""
    students: ReceiptUris
    """The receipts of the fine-tuned student at every learning rate."""
    evaluation: ReceiptUri
    """The evaluation's receipt."""
    promotion: ReceiptUri
    """The promote stage's receipt."""
    image_column: str = "image"
    """Parquet column of the images that the gallery shows."""


def report(config: ReportConfig) -> ReportReceipt:
    """Write `report.html` and `results.json` under the run's name.

    Files of an earlier attempt are replaced, for the stage always runs again.

    Args:
        config: The receipts of the run.

    Returns:
        The receipt. It names both files.

    Raises:
        InvalidInputError: If the evaluation measured models of another run, or a receipt is missing.
        SemiscaleError: If the accounting of the pool does not add up.

    Cost:
        Reads the receipts and about a hundred images. This does not grow with the pool.
    """
    started = time.monotonic()
    run = load_receipts(config)
    check_accounting(run.selection)
    gallery = build_gallery(run.plan, run.selection, SampleFields(config.image_column, "", run.plan.is_video))
    folder = storage.join(config.workdir, run.plan.name)
    page_uri, results_uri = storage.join(folder, "report.html"), storage.join(folder, "results.json")
    for warning in validation_warnings(run.plan, run.teacher):
        log_info("report", f"warning: {warning}")
    header = load_page_header(run, config.workdir)
    storage.write_bytes(page_uri, render(run, header, gallery, failure_examples(run)).encode())
    storage.write_bytes(results_uri, json.dumps(build_results(run), indent=1).encode())
    store_receipts(run, storage.join(folder, "receipts"))
    log_info("report", page_uri)
    return ReportReceipt(
        stage=config.stage,
        digest=config.digest(),
        folder=folder,
        seconds=round(time.monotonic() - started, 3),
        report=page_uri,
        results=results_uri,
    )


def load_receipts(config: ReportConfig) -> RunReceipts:
    """Load the receipts.

    Args:
        config: The URIs of the receipts.

    Returns:
        The receipts of the run.

    Raises:
        InvalidInputError: If a receipt is missing or of another kind.
    """
    return RunReceipts(
        plan=load_document(config.plan, PlanReceipt),
        teacher=load_document(config.teacher, TrainReceipt),
        baselines=[load_document(uri, TrainReceipt) for uri in config.baselines],
        scores=[load_document(uri, ScoreReceipt) for uri in config.scores],
        selection=load_document(config.selection, SelectionReceipt),
        packed=load_document(config.packed, PackReceipt),
        pretrained=load_document(config.pretrained, TrainReceipt),
        students=[load_document(uri, TrainReceipt) for uri in config.students],
        evaluation=load_document(config.evaluation, EvaluationReceipt),
        promotion=load_document(config.promotion, PromotionReceipt),
    )


def check_accounting(selection: SelectionReceipt) -> None:
    """Check that every listed image is scored, failed or removed.

    Args:
        selection: The receipt of the merge.

    Raises:
        SemiscaleError: If the accounting does not add up. The page would be wrong about the pool.
    """
    accounting = selection.ledger
    total = accounting.scored + accounting.failed + accounting.removed
    with_reason = sum(selection.failed.values())
    if accounting.listed != total or accounting.failed != with_reason:
        raise SemiscaleError(
            "SEMI-E356",
            f"accounting: {accounting.listed} listed, but {accounting.scored} scored + {accounting.failed} failed + "
            f"{accounting.removed} removed = {total}, and {with_reason} failures have a reason. Merge again.",
        )


def store_receipts(run: RunReceipts, folder: str) -> None:
    """Write the receipts under the run's name, so that a stage can be run again by hand.

    Receipts of an earlier round without a counterpart are deleted, such as those of more pods.

    Args:
        run: The receipts.
        folder: URI of the folder to write to.
    """
    names: set[str] = set()
    for part in fields(run):
        value = getattr(run, part.name)
        named = (
            {f"{part.name}-{number:03}.json": receipt for number, receipt in enumerate(value)}
            if isinstance(value, list)
            else {f"{part.name}.json": value}
        )
        names.update(named)
        for name, receipt in named.items():
            storage.write_bytes(storage.join(folder, name), receipt.model_dump_json(indent=1).encode())
    for entry in list(storage.list_objects(folder)):
        if entry.uri.rpartition("/")[2] not in names:
            storage.delete(entry.uri)


def build_results(run: RunReceipts) -> dict[str, object]:
    """Return the content of `results.json`: accuracies in [0, 1], counts, seconds."""
    selection = run.selection
    models = run.evaluation.models
    return {
        **{name: models[name].model_dump(include=METRIC_FIELDS) for name in run.evaluated_models()},
        "comparisons": {
            comparison.against: comparison.model_dump(exclude={"model", "against"})
            for comparison in run.evaluation.comparisons
        },
        "promotion": run.promotion.model_dump(include={"promoted", "why"}),
        "selection": {
            "images": selection.images,
            "unique_images": selection.unique_images,
            "classes": len(selection.per_class),
            "short_classes": sum(stats.found < stats.wanted for stats in selection.per_class),
            "images_per_class": selection.images_per_class,
            "classes_per_image": selection.classes_per_image,
        },
        "ledger": selection.ledger.model_dump(),
        "seconds": run.seconds(),
    }
