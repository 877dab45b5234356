"""The verb `promote`: make the student of a finished run the champion, or restore the champion before it."""

import argparse
from pathlib import Path

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.run import display_path
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.stages.promote.champion import champion_uri, rollback_record, update_champion
from semiscale.stages.promote.stage import PromoteConfig
from semiscale.stages.promote.stage import promote as promote_stage


def promote(path: Path, force: bool) -> None:
    """Compare the student of a finished run with the champion, and promote it if it is not worse.

    Args:
        path: The run file.
        force: Promote the student whatever the comparison says.

    Raises:
        InvalidInputError: The run has not finished.
        SemiscaleError: The student was not promoted.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    receipt = promote_stage(promote_config(settings, force))
    print(f"champion: {display_path(receipt.champion)}")
    if not receipt.promoted and receipt.comparison:
        raise SemiscaleError(
            "SEMI-E431", f"{path}: The student was not promoted: {receipt.why}. Use --force to promote it anyway."
        )


def rollback(path: Path) -> None:
    """Restore the champion before the current one.

    A model that was withdrawn is promoted again with `--force` alone.

    Raises:
        InvalidInputError: There is no champion, or it is the first.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    uri = champion_uri(settings.workdir, settings.champion or settings.name)
    champion = update_champion(uri, lambda champion: rollback_record(uri, champion))
    if champion:
        current = champion.current
        print(f"champion: {current.model} of run {current.run!r} again, {current.top1:.2%} top-1; {display_path(uri)}")


def promote_config(settings: RunConfig, force: bool) -> PromoteConfig:
    """Return the config of the promotion of a finished run.

    Args:
        settings: The run file.
        force: Promote the student whatever the comparison says.

    Raises:
        InvalidInputError: The run has not finished.
    """
    folder = storage.join(settings.workdir, settings.name, "receipts")
    receipts = {name: storage.join(folder, f"{name}.json") for name in ("plan", "evaluation")}
    for uri in receipts.values():
        if storage.head(uri) is None:
            raise InvalidInputError("SEMI-E430", f"{uri}: The receipt is missing. Run the pipeline first.")
    values = settings.model_dump(include=set(PromoteConfig.model_fields))
    return PromoteConfig.model_validate({**values, **receipts, "promotion": "if-not-worse", "force": force})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `promote`."""
    parser.add_argument("run_file", type=Path, help="of a finished run")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--force", action="store_true", help="whatever the comparison says")
    choice.add_argument("--rollback", action="store_true", help="withdraw the champion for the one before it")


def execute(options: Options) -> None:
    """Run the verb."""
    if options.rollback:
        rollback(options.run_file)
    else:
        promote(options.run_file, options.force)


COMMAND = Command(
    help="make a run's student the champion, or go back",
    description="Compare the student of a finished run with the champion on the same test images. If the student is\n"
    "not worse, it becomes the champion.",
    examples=("my-run.yaml", "my-run.yaml --rollback"),
    add_arguments=add_arguments,
    execute=execute,
)
