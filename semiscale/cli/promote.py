"""Promote: make a finished run's student the champion if it is not worse, or go back to the champion before it."""

from pathlib import Path

from semiscale import storage
from semiscale.cli.run_local import display_path
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.stages.promote.champion import champion_uri, rollback_record, update_champion
from semiscale.stages.promote.stage import PromoteConfig
from semiscale.stages.promote.stage import promote as stage


def promote(path: Path, force: bool) -> None:
    """Compare a finished run's student with the champion on the same test images; not worse, it is the champion."""
    settings = run_config.load_run_config(path).with_absolute_uris()
    receipt = stage(promote_config(settings, force))
    print(f"champion: {display_path(receipt.champion)}")
    if not receipt.promoted and receipt.comparison:
        raise SemiscaleError(f"not promoted: {receipt.why}; --force promotes it all the same")


def rollback(path: Path) -> None:
    """Withdraw the champion for the one before it. A model that was withdrawn is promoted again by force alone."""
    settings = run_config.load_run_config(path).with_absolute_uris()
    uri = champion_uri(settings.workdir, settings.champion or settings.name)
    champion = update_champion(uri, lambda champion: rollback_record(uri, champion))
    if champion:
        current = champion.current
        print(f"champion: {current.model} of run {current.run!r} again, {current.top1:.2%} top-1; {display_path(uri)}")


def promote_config(settings: RunConfig, force: bool) -> PromoteConfig:
    """Return the run's promotion, asked for by hand. Raises InvalidInputError where the run is not finished."""
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = {name: storage.join(folder, f"{name}.json") for name in ("plan", "evaluation")}
    for uri in receipts.values():
        if storage.head(uri) is None:
            raise InvalidInputError(f"{uri}: no receipt; run the pipeline first")
    own = settings.model_dump(include=set(PromoteConfig.model_fields))
    return PromoteConfig.model_validate({**own, **receipts, "promotion": "if-not-worse", "force": force})
