"""Reselect: another D̂ from the scores at hand: other K and P, a threshold, a removal list; nothing is scored again."""

from pathlib import Path

from components.merge.merge import MergeConfig, selected
from components.shared import runfile, storage
from components.shared.errors import Refused
from components.shared.runfile import RunFile
from components.verbs.run import located, shown


def reselect(path: Path, changes: dict[str, object]) -> None:
    """Select again for a finished run, and print what changed and where the new selection lies."""
    settings = located(runfile.load(path))
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
    if not receipts:
        raise Refused(f"{folder}: no receipts; run the pipeline first")
    own = settings.model_dump(include=set(MergeConfig.model_fields))
    given = {name: value for name, value in changes.items() if value is not None}
    named = {
        "plan": storage.join(folder, "plan.json"),
        "scores": [uri for uri in receipts if uri.rpartition("/")[2].startswith("scores-")],
    }
    return MergeConfig.model_validate({**own, **named, **given})
