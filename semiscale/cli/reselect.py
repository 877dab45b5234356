"""The verb `reselect`: select another D̂ from the scores of a run, without scoring again."""

import argparse
import json
from pathlib import Path

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.run import display_path
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt
from semiscale.stages.merge.stage import MergeConfig, select_from_pool
from semiscale.storage.documents import load_document


def reselect(path: Path, changes: dict[str, object]) -> None:
    """Select again for a run whose pool has been scored, and print the new selection.

    Args:
        path: The run file.
        changes: Values of the selection that differ from the run file. None: as in the run file.

    Raises:
        InvalidInputError: The pool of the run has not been scored, or a value is invalid.
        SemiscaleError: No image can be selected.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    receipt = select_from_pool(select_config(settings, changes))
    print(
        f"{receipt.images:,} images ({receipt.unique_images:,} different), K = {receipt.images_per_class:,}, "
        f"P = {receipt.classes_per_image}; {receipt.ledger.removed:,} removed"
    )
    asked = changes.get("classes_per_image") or receipt.classes_per_image
    if asked != receipt.classes_per_image:
        print(f"classes_per_image: P = {asked} is more than the {receipt.classes_per_image} classes of the run.")
    print(f"selection: {display_path(receipt.selection)}")


def select_config(settings: RunConfig, changes: dict[str, object]) -> MergeConfig:
    """Return the merge config of a run with some values changed.

    Args:
        settings: The run file.
        changes: Values that differ from the run file. None: as in the run file.

    Raises:
        InvalidInputError: The pool of the run has not been scored.
    """
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = [entry.uri for entry in storage.list_objects(folder)]
    plan = storage.join(folder, "plan.json")
    scores = [uri for uri in receipts if uri.rpartition("/")[2].startswith("scores-")]
    if not receipts:
        plan, scores = find_unfinished_run(settings)
    values = settings.model_dump(include=set(MergeConfig.model_fields))
    changed = {name: value for name, value in changes.items() if value is not None}
    return MergeConfig.model_validate({**values, "plan": plan, "scores": scores, **changed})


def find_unfinished_run(settings: RunConfig) -> tuple[str, list[str]]:
    """Return the receipts of a run that ended after its scan and before its report.

    A run whose pool grows has several plans. The plan of the largest pool that has scores is taken.

    Returns:
        URI of the receipt of the plan, and URIs of receipts of its scores.

    Raises:
        InvalidInputError: No plan of the run has scores, or several teachers scored it.

    Cost:
        One listing of each folder of scores.
    """
    stages = storage.join(settings.workdir, "stages")
    folders = [storage.join(stages, "score", name) for name in storage.list_dirs(storage.join(stages, "score"))]
    scored_groups = {folder: set(storage.list_dirs(folder)) for folder in folders}
    candidates = [
        (plan.size_bytes, uri, folder)
        for uri, plan in find_plans(settings.name, storage.join(stages, "plan"))
        for folder in folders
        if {group["digest"] for group in json.loads(storage.read_bytes(plan.units))} <= scored_groups[folder]
    ]
    if not candidates:
        raise InvalidInputError(
            "SEMI-E432", f"{stages}: Run {settings.name!r} has no scores of its whole pool. Run the pipeline first."
        )
    _, plan_uri, _ = max(candidates)
    score_folders = [folder for _, uri, folder in candidates if uri == plan_uri]
    if len(score_folders) > 1:
        raise InvalidInputError(
            "SEMI-E433",
            f"{settings.name}: The pool has scores by {len(score_folders)} teachers: {', '.join(score_folders)}. "
            "Finish the run, so that its receipts name one of them.",
        )
    return plan_uri, [write_combined_score_receipt(score_folders[0])]


def find_plans(name: str, folder: str) -> list[tuple[str, PlanReceipt]]:
    """Return URI and receipt of every plan of a run.

    Args:
        name: Name of the run.
        folder: Folder of all plans in the workdir.
    """
    uris = [storage.join(folder, digest, "receipt.json") for digest in storage.list_dirs(folder)]
    plans = [(uri, load_document(uri, PlanReceipt)) for uri in uris if storage.head(uri)]
    return [(uri, plan) for uri, plan in plans if plan.name == name]


def write_combined_score_receipt(folder: str) -> str:
    """Write one receipt for all pods that wrote a folder of scores.

    It has the fields that a merge reads. Its counts are 0.

    Returns:
        URI of the receipt.
    """
    name = folder.rpartition("/")[2]
    receipt = ScoreReceipt(
        stage="score", digest=name, folder=folder, seconds=0, pod=0, teacher=name.rpartition("-top")[0], units=0,
        units_found=0, listed=0, scored=0, failed={}, clocks=PartSeconds(),
    )  # fmt: skip
    uri = storage.join(folder, "pods.json")
    storage.write_bytes(uri, receipt.model_dump_json(indent=1).encode())
    return uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `reselect`."""
    parser.add_argument("run_file", type=Path, help="of a run whose pool has been scored")
    parser.add_argument("--images-per-class", type=int, metavar="K")
    parser.add_argument("--classes-per-image", type=int, metavar="P")
    parser.add_argument("--min-probability", type=float, metavar="SHARE", help="select nothing below this score")
    parser.add_argument("--remove", metavar="LIST", help="URI of a text file, one key a line, never to select")


def execute(options: Options) -> None:
    """Run the verb."""
    names = ("images_per_class", "classes_per_image", "min_probability", "remove")
    reselect(options.run_file, {name: getattr(options, name) for name in names})


COMMAND = Command(
    help="select again from a run's scores, without scoring",
    description="Select again for a run whose pool has been scored, and print the new selection and its path.",
    examples=("my-run.yaml --images-per-class 8000 --remove gs://b/opt-outs.txt",),
    add_arguments=add_arguments,
    execute=execute,
)
