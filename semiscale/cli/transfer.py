"""The verb `transfer`: continue a training on the classes of a run file, by the paper's settings for CUB2011."""

import argparse
from pathlib import Path

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.measure import ensure_plan, evaluate_and_store
from semiscale.cli.model_source import SOURCE_HELP, resolve_model
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.models import checkpoint_metadata
from semiscale.stages.train.config import LinearProbeConfig, TrainConfig
from semiscale.stages.train.stage import fit_linear_probe, train

# Section 5.2, Table 8.
SETTINGS = ("full-ft", "fc-only")
# The run-file keys that fit a linear head.
LINEAR_PROBE_KEYS = {"workdir", "image_column", "label_column", "resolution", "augmentation"}
# The run-file keys that train all layers. The learning rate and the epochs are options of the verb.
FINETUNE_KEYS = {*LINEAR_PROBE_KEYS, "batch_size", "device_batch_size", "weight_decay", "frames", "seed"}


def transfer(path: Path, start: str, setting: str, changes: dict[str, object]) -> None:
    """Train a model with a new head on the labeled set of a run file, and measure it.

    The network is the run file's `student_architecture`. The pool is not read. Finished work is reused.

    Args:
        path: The run file.
        start: A trained model or a file of weights.
        setting: `full-ft` trains every layer by the paper's recipe for CUB2011 (Table 13). `fc-only` fits the head
            alone by logistic regression, with its L2 chosen on validation (section 5.2, Table 8).
        changes: Values of `learning_rate` and `epochs` that differ from the recipe.

    Raises:
        InvalidInputError: The run file, the model or an option is invalid.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    if setting == "fc-only":
        check_linear_probe_options(settings, changes)
    weights, plan = resolve_weights(start), ensure_plan(settings)
    uri = storage.join(plan.folder, "receipt.json")
    if setting == "fc-only":
        evaluate_and_store(settings, plan, fit_linear_probe(linear_probe_config(settings, uri, weights)))
    else:
        evaluate_and_store(settings, plan, train(finetune_config(settings, uri, weights, changes)))


def check_linear_probe_options(settings: RunConfig, changes: dict[str, object]) -> None:
    """Check that fc-only is given nothing that only full-ft supports.

    Args:
        settings: The run file.
        changes: Options that were given.

    Raises:
        InvalidInputError: An option or the kind of samples needs full-ft.
    """
    for name in changes:
        raise InvalidInputError(
            "SEMI-E428",
            f"--{name.replace('_', '-')}: fc-only does not have this option, because its L2 is chosen on validation. "
            "Remove the option, or use --setting full-ft.",
        )
    if settings.frames:
        raise InvalidInputError(
            "SEMI-E429",
            f"frames: fc-only supports images, not clips of {settings.frames} frames. Use --setting full-ft.",
        )


def resolve_weights(start: str) -> str:
    """Return the URI of the weights of a trained model, or of a foreign file as it is."""
    is_foreign = start.partition("#")[0].endswith(checkpoint_metadata.TORCH_SUFFIXES)
    return storage.absolute_uri(start) if is_foreign else resolve_model(start, "student").checkpoint


def finetune_config(settings: RunConfig, plan: str, weights: str, changes: dict[str, object]) -> TrainConfig:
    """Return the config of full-ft.

    Args:
        settings: The run file. Its recipe gives every value that neither the run file nor an option states.
        plan: URI of the receipt of the plan.
        weights: URI of the weights to start from.
        changes: Values that options changed.
    """
    return TrainConfig.model_validate(
        {
            **settings.model_dump(include=FINETUNE_KEYS),
            "recipe": "transfer",
            "architecture": settings.student_architecture,
            "plan": plan,
            "start_weights": weights,
            **changes,
        }
    )


def linear_probe_config(settings: RunConfig, plan: str, weights: str) -> LinearProbeConfig:
    """Return the config of fc-only.

    Args:
        settings: The run file.
        plan: URI of the receipt of the plan.
        weights: URI of the weights to start from.
    """
    return LinearProbeConfig.model_validate(
        {
            **settings.model_dump(include=LINEAR_PROBE_KEYS),
            "architecture": settings.student_architecture,
            "plan": plan,
            "start_weights": weights,
        }
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `transfer`."""
    parser.add_argument("run_file", type=Path, help="of the new classes; `unlabeled: []` where there is no pool")
    parser.add_argument("start", help=f"{SOURCE_HELP}, or weights from elsewhere (.pth, .pt)")
    parser.add_argument(
        "--setting", choices=SETTINGS, default=SETTINGS[0], help="train every layer (%(default)s), or the head alone"
    )
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="for 256 images (0.0025)")
    parser.add_argument("--epochs", type=int, metavar="N", help="over the labeled set (300)")


def execute(options: Options) -> None:
    """Run the verb."""
    values = {"learning_rate": options.learning_rate, "epochs": options.epochs}
    changes = {name: value for name, value in values.items() if value is not None}
    transfer(options.run_file, options.start, options.setting, changes)


COMMAND = Command(
    help="continue the training of a model on other classes",
    description="Train a model with a new head on a run file's labeled set, and measure it on the run file's test\n"
    "set.\n\n"
    "full-ft trains every layer, by the paper's recipe for CUB2011 (Table 13). fc-only keeps the layers and fits the\n"
    "head alone, by logistic regression, with its L2 chosen on validation (section 5.2, Table 8). The network is the\n"
    "run file's student_architecture. The pool is not read. Finished work is reused.",
    examples=("birds.yaml my-run.yaml", "birds.yaml resnet50.pth --setting fc-only"),
    add_arguments=add_arguments,
    execute=execute,
)
