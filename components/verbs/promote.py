"""Promote: make a finished run's student the champion if it is not worse, or go back to the champion before it."""

from pathlib import Path

from components.promote.champion import champion_uri, rolled_back, switch
from components.promote.promote import PromoteConfig
from components.promote.promote import promote as stage
from components.shared import runfile, storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.runfile import RunFile
from components.verbs.run import shown


def promote(path: Path, force: bool) -> None:
    """Compare a finished run's student with the champion on the same test images; not worse, it is the champion."""
    settings = runfile.load(path).located()
    receipt = stage(config_of(settings, force))
    print(f"champion: {shown(receipt.champion)}")
    if not receipt.promoted and receipt.comparison:
        raise SemiscaleError(f"not promoted: {receipt.why}; --force promotes it all the same")


def rollback(path: Path) -> None:
    """Withdraw the champion for the one before it. A model that was withdrawn is promoted again by force alone."""
    settings = runfile.load(path).located()
    uri = champion_uri(settings.workdir, settings.champion or settings.name)
    champion = switch(uri, lambda champion: rolled_back(uri, champion))
    if champion:
        current = champion.current
        print(f"champion: {current.model} of run {current.run!r} again, {current.top1:.2%} top-1; {shown(uri)}")


def config_of(settings: RunFile, force: bool) -> PromoteConfig:
    """Return the run's promotion, asked for by hand. Raises Refused where the run is not finished."""
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = {name: storage.join(folder, f"{name}.json") for name in ("plan", "evaluation")}
    for uri in receipts.values():
        if storage.stat(uri) is None:
            raise Refused(f"{uri}: no receipt; run the pipeline first")
    own = settings.model_dump(include=set(PromoteConfig.model_fields))
    return PromoteConfig.model_validate({**own, **receipts, "promotion": "if-not-worse", "force": force})
