"""Report: what a run did and what came of it, as one page for people and one JSON file for programs."""

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
from semiscale.runtime.stage_config import ReceiptUri, ReceiptUris, StageConfig
from semiscale.stages.report.failure_examples import failure_examples
from semiscale.stages.report.gallery import build_gallery
from semiscale.stages.report.render import render
from semiscale.stages.report.run_receipts import RunReceipts
from semiscale.storage.documents import load_document

METRIC_FIELDS = {"top1", "top5", "calibration_error", "top1_interval", "top5_interval", "calibration_error_interval"}


class ReportConfig(StageConfig):
    """Every receipt of the run. `image_column` is where a Parquet pool keeps the images that the gallery shows."""

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
    """Write `report.html` and `results.json` under the run's name, replacing those of an earlier try.

    Always done anew: it reads the receipts and a hundred or so images, whatever the pool. Raises SemiscaleError where
    the ledger does not add up, InvalidInputError where the evaluation is of another run.
    """
    started = time.monotonic()
    run = load_receipts(config)
    check_accounting(run.selection)
    shown = build_gallery(run.plan, run.selection, SampleFields(config.image_column, "", run.plan.is_video))
    folder = storage.join(config.workdir, run.plan.name)
    page, numbers = storage.join(folder, "report.html"), storage.join(folder, "results.json")
    storage.write_bytes(page, render(run, shown, failure_examples(run)).encode())
    storage.write_bytes(numbers, json.dumps(build_results(run), indent=1).encode())
    store_receipts(run, storage.join(folder, "receipts"))
    log_info("report", page)
    return ReportReceipt(
        stage=config.stage,
        digest=config.digest(),
        folder=folder,
        seconds=round(time.monotonic() - started, 3),
        report=page,
        results=numbers,
    )


def load_receipts(config: ReportConfig) -> RunReceipts:
    """Load the receipts. Raises InvalidInputError for one that is missing or of another kind."""
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
    """Raise SemiscaleError where the ledger does not add up: the page would tell an untruth about the pool."""
    ledger = selection.ledger
    found = ledger.scored + ledger.failed + ledger.removed
    if ledger.listed != found or ledger.failed != sum(selection.failed.values()):
        raise SemiscaleError(
            f"ledger: {ledger.listed} listed, but {ledger.scored} scored + {ledger.failed} failed + {ledger.removed} "
            f"removed = {found}, and {sum(selection.failed.values())} failures have a reason; merge again"
        )


def store_receipts(run: RunReceipts, folder: str) -> None:
    """Write the run's receipts under its name, so that a stage can be run again by hand on what this run made.

    Those of an earlier round that this one has no counterpart of, such as those of more pods, are deleted.
    """
    names: set[str] = set()
    for part in fields(run):
        value = getattr(run, part.name)
        named = (
            {f"{part.name}-{number:03}.json": one for number, one in enumerate(value)}
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
    """Return the run's numbers: accuracies in [0, 1], counts, seconds."""
    selection = run.selection
    models = run.evaluation.models
    return {
        **{name: models[name].model_dump(include=METRIC_FIELDS) for name in run.evaluated_models()},
        "comparisons": {
            one.against: one.model_dump(exclude={"model", "against"}) for one in run.evaluation.comparisons
        },
        "promotion": run.promotion.model_dump(include={"promoted", "why"}),
        "selection": {
            "images": selection.images,
            "unique_images": selection.unique_images,
            "classes": len(selection.per_class),
            "short_classes": sum(one.found < one.wanted for one in selection.per_class),
            "images_per_class": selection.images_per_class,
            "classes_per_image": selection.classes_per_image,
        },
        "ledger": selection.ledger.model_dump(),
        "seconds": run.seconds(),
    }
