"""Reselect: another D̂ from the scores at hand: other K and P, a threshold, a removal list; nothing is scored again."""

import json
from pathlib import Path

from semiscale import storage
from semiscale.cli.run_local import display_path
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt
from semiscale.stages.merge.stage import MergeConfig, select_from_pool
from semiscale.storage.documents import load_document


def reselect(path: Path, changes: dict[str, object]) -> None:
    """Select again for a run whose pool has been scored, and print what came of it and where the new selection lies."""
    settings = run_config.load_run_config(path).with_absolute_uris()
    receipt = select_from_pool(select_config(settings, changes))
    print(
        f"{receipt.images:,} images ({receipt.unique_images:,} different), K = {receipt.images_per_class:,}, "
        f"P = {receipt.classes_per_image}; {receipt.ledger.removed:,} removed"
    )
    print(f"selection: {display_path(receipt.selection)}")


def select_config(settings: RunConfig, changes: dict[str, object]) -> MergeConfig:
    """Return the run's merge with some parameters changed. Raises InvalidInputError where the run has not been
    scored."""
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = [entry.uri for entry in storage.list_objects(folder)]
    plan = storage.join(folder, "plan.json")
    scores = [uri for uri in receipts if uri.rpartition("/")[2].startswith("scores-")]
    if not receipts:
        plan, scores = find_unfinished_run(settings)
    own = settings.model_dump(include=set(MergeConfig.model_fields))
    given = {name: value for name, value in changes.items() if value is not None}
    return MergeConfig.model_validate({**own, "plan": plan, "scores": scores, **given})


def find_unfinished_run(settings: RunConfig) -> tuple[str, list[str]]:
    """Return the receipts of a run that ended after its scan and before its report: its plan's, and one of its scores.

    Of several plans, as a pool grows, that of the largest pool that has scores. Raises InvalidInputError where none
    has, or where
    several teachers scored it. Costs a listing of each folder of scores.
    """
    stages = storage.join(settings.workdir, "stages")
    folders = [storage.join(stages, "score", name) for name in storage.list_dirs(storage.join(stages, "score"))]
    units = {folder: set(storage.list_dirs(folder)) for folder in folders}
    found = [
        (plan.size_bytes, uri, folder)
        for uri, plan in find_plans(settings.name, storage.join(stages, "plan"))
        for folder in folders
        if {unit["digest"] for unit in json.loads(storage.read_bytes(plan.units))} <= units[folder]
    ]
    if not found:
        raise InvalidInputError(
            f"{stages}: no scores of the whole pool of a run {settings.name!r}; run the pipeline first"
        )
    _, plan_uri, _ = max(found)
    scored = [folder for _, uri, folder in found if uri == plan_uri]
    if len(scored) > 1:
        raise InvalidInputError(
            f"run {settings.name!r} has scores by {len(scored)} teachers: {', '.join(scored)}; finish it"
        )
    return plan_uri, [write_combined_score_receipt(scored[0])]


def find_plans(name: str, folder: str) -> list[tuple[str, PlanReceipt]]:
    """Return the receipts of the plans of a run."""
    uris = [storage.join(folder, one, "receipt.json") for one in storage.list_dirs(folder)]
    found = [(uri, load_document(uri, PlanReceipt)) for uri in uris if storage.head(uri)]
    return [(uri, plan) for uri, plan in found if plan.name == name]


def write_combined_score_receipt(folder: str) -> str:
    """Write the receipt of the pods that left a folder of scores, as far as a merge reads it: no counts.

    Returns its URI.
    """
    name = folder.rpartition("/")[2]
    receipt = ScoreReceipt(
        stage="score", digest=name, folder=folder, seconds=0, pod=0, teacher=name.rpartition("-top")[0], units=0,
        units_found=0, listed=0, scored=0, failed={}, clocks=PartSeconds(),
    )  # fmt: skip
    uri = storage.join(folder, "pods.json")
    storage.write_bytes(uri, receipt.model_dump_json(indent=1).encode())
    return uri
