"""Reselect: another D̂ from the scores at hand: other K and P, a threshold, a removal list; nothing is scored again."""

import json
from pathlib import Path

from components.merge.merge import MergeConfig, selected
from components.shared import runfile, storage
from components.shared.errors import Refused
from components.shared.receipts import Clocks, PlanReceipt, ScoreReceipt, load
from components.shared.runfile import RunFile
from components.verbs.run import shown


def reselect(path: Path, changes: dict[str, object]) -> None:
    """Select again for a run whose pool has been scored, and print what came of it and where the new selection lies."""
    settings = runfile.load(path).located()
    receipt = selected(config_of(settings, changes))
    print(
        f"{receipt.images:,} images ({receipt.unique_images:,} different), K = {receipt.images_per_class:,}, "
        f"P = {receipt.classes_per_image}; {receipt.ledger.removed:,} removed"
    )
    print(f"selection: {shown(receipt.selection)}")


def config_of(settings: RunFile, changes: dict[str, object]) -> MergeConfig:
    """Return the run's merge with some parameters changed. Raises Refused where the run has not been scored."""
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = [entry.uri for entry in storage.entries(folder)]
    plan = storage.join(folder, "plan.json")
    scores = [uri for uri in receipts if uri.rpartition("/")[2].startswith("scores-")]
    if not receipts:
        plan, scores = unfinished(settings)
    own = settings.model_dump(include=set(MergeConfig.model_fields))
    given = {name: value for name, value in changes.items() if value is not None}
    return MergeConfig.model_validate({**own, "plan": plan, "scores": scores, **given})


def unfinished(settings: RunFile) -> tuple[str, list[str]]:
    """Return the receipts of a run that ended after its scan and before its report: its plan's, and one of its scores.

    Of several plans, as a pool grows, that of the largest pool that has scores. Raises Refused where none has, or where
    several teachers scored it. Costs a listing of each folder of scores.
    """
    stages = storage.join(settings.workdir, "stages")
    folders = [storage.join(stages, "score", name) for name in storage.folders(storage.join(stages, "score"))]
    units = {folder: set(storage.folders(folder)) for folder in folders}
    found = [
        (plan.size_bytes, uri, folder)
        for uri, plan in plans(settings.name, storage.join(stages, "plan"))
        for folder in folders
        if {unit["digest"] for unit in json.loads(storage.read(plan.units))} <= units[folder]
    ]
    if not found:
        raise Refused(f"{stages}: no scores of the whole pool of a run {settings.name!r}; run the pipeline first")
    _, plan_uri, _ = max(found)
    scored = [folder for _, uri, folder in found if uri == plan_uri]
    if len(scored) > 1:
        raise Refused(f"run {settings.name!r} has scores by {len(scored)} teachers: {', '.join(scored)}; finish it")
    return plan_uri, [all_pods(scored[0])]


def plans(name: str, folder: str) -> list[tuple[str, PlanReceipt]]:
    """Return the receipts of the plans of a run."""
    uris = [storage.join(folder, one, "receipt.json") for one in storage.folders(folder)]
    found = [(uri, load(uri, PlanReceipt)) for uri in uris if storage.stat(uri)]
    return [(uri, plan) for uri, plan in found if plan.name == name]


def all_pods(folder: str) -> str:
    """Write the receipt of the pods that left a folder of scores, as far as a merge reads it: no counts.

    Returns its URI.
    """
    name = folder.rpartition("/")[2]
    receipt = ScoreReceipt(
        stage="score", digest=name, folder=folder, seconds=0, pod=0, teacher=name.rpartition("-top")[0], units=0,
        units_found=0, listed=0, scored=0, failed={}, clocks=Clocks(),
    )  # fmt: skip
    uri = storage.join(folder, "pods.json")
    storage.write(uri, receipt.model_dump_json(indent=1).encode())
    return uri
