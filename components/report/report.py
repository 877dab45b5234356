"""Report: what a run did and what came of it, as one page for people and one JSON file for programs."""

import json
import time
from dataclasses import fields
from typing import ClassVar

from components.report.failures import examples
from components.report.gallery import gallery
from components.report.page import render
from components.report.run import Run
from components.shared import storage
from components.shared.errors import SemiscaleError
from components.shared.progress import say
from components.shared.receipts import (
    EvaluationReceipt,
    PackReceipt,
    PlanReceipt,
    PromotionReceipt,
    ReportReceipt,
    ScoreReceipt,
    SelectionReceipt,
    TrainReceipt,
    load,
)
from components.shared.shards import Columns
from components.shared.stage import ReceiptUri, ReceiptUris, StageConfig

MEASURES = {"top1", "top5", "calibration_error", "top1_interval", "top5_interval", "calibration_error_interval"}


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
    the ledger does not add up, Refused where the evaluation is of another run.
    """
    started = time.monotonic()
    run = read(config)
    refuse_holes(run.selection)
    shown = gallery(run.plan, run.selection, Columns(config.image_column, "", run.plan.videos))
    folder = storage.join(config.workdir, run.plan.name)
    page, numbers = storage.join(folder, "report.html"), storage.join(folder, "results.json")
    storage.write(page, render(run, shown, examples(run)).encode())
    storage.write(numbers, json.dumps(results(run), indent=1).encode())
    keep(run, storage.join(folder, "receipts"))
    say("report", page)
    return ReportReceipt(
        stage=config.stage,
        digest=config.digest(),
        folder=folder,
        seconds=round(time.monotonic() - started, 3),
        report=page,
        results=numbers,
    )


def read(config: ReportConfig) -> Run:
    """Load the receipts. Raises Refused for one that is missing or of another kind."""
    return Run(
        plan=load(config.plan, PlanReceipt),
        teacher=load(config.teacher, TrainReceipt),
        baselines=[load(uri, TrainReceipt) for uri in config.baselines],
        scores=[load(uri, ScoreReceipt) for uri in config.scores],
        selection=load(config.selection, SelectionReceipt),
        packed=load(config.packed, PackReceipt),
        pretrained=load(config.pretrained, TrainReceipt),
        students=[load(uri, TrainReceipt) for uri in config.students],
        evaluation=load(config.evaluation, EvaluationReceipt),
        promotion=load(config.promotion, PromotionReceipt),
    )


def refuse_holes(selection: SelectionReceipt) -> None:
    """Raise SemiscaleError where the ledger does not add up: the page would tell an untruth about the pool."""
    ledger = selection.ledger
    found = ledger.scored + ledger.failed + ledger.removed
    if ledger.listed != found or ledger.failed != sum(selection.failed.values()):
        raise SemiscaleError(
            f"ledger: {ledger.listed} listed, but {ledger.scored} scored + {ledger.failed} failed + {ledger.removed} "
            f"removed = {found}, and {sum(selection.failed.values())} failures have a reason; merge again"
        )


def keep(run: Run, folder: str) -> None:
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
            storage.write(storage.join(folder, name), receipt.model_dump_json(indent=1).encode())
    for entry in list(storage.entries(folder)):
        if entry.uri.rpartition("/")[2] not in names:
            storage.delete(entry.uri)


def results(run: Run) -> dict[str, object]:
    """Return the run's numbers: accuracies in [0, 1], counts, seconds."""
    selection = run.selection
    models = run.evaluation.models
    return {
        **{name: models[name].model_dump(include=MEASURES) for name in run.measured()},
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
