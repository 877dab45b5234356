"""Transfer: a trained model goes on to a run file's class set by the paper's settings for CUB2011, and is measured."""

from pathlib import Path

from semiscale import storage
from semiscale.cli.measure import ensure_plan, evaluate_and_store
from semiscale.cli.model_source import resolve_model
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.models import checkpoint_metadata
from semiscale.stages.train.config import LinearProbeConfig, TrainConfig
from semiscale.stages.train.stage import fit_linear_probe, train

SETTINGS = ("full-ft", "fc-only")  # section 5.2, Table 8
# What of a run file a head is fitted by.
LINEAR_PROBE_KEYS = {"workdir", "image_column", "label_column", "resolution", "augmentation"}
# And what all layers are trained by; learning rate and epochs are options of the verb.
FINETUNE_KEYS = {*LINEAR_PROBE_KEYS, "batch_size", "device_batch_size", "weight_decay", "frames", "seed"}


def transfer(path: Path, start: str, setting: str, changes: dict[str, object]) -> None:
    """Take a trained model to a run file's labeled set, with a new head, and measure it on its test set.

    full-ft trains every layer, by the paper's recipe for CUB2011 (Table 13); fc-only leaves them as they are and fits
    the head alone, by logistic regression, its L2 chosen on validation (section 5.2, Table 8). The network is the run
    file's student_architecture; the pool is not looked at. Finished work is found, not repeated.
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
    """Raise InvalidInputError where fc-only is given what only full-ft takes."""
    for name in changes:
        raise InvalidInputError(
            f"--{name.replace('_', '-')}: of full-ft; fc-only has none, and its L2 is chosen on validation"
        )
    if settings.frames:
        raise InvalidInputError(f"frames: {settings.frames}, and fc-only is of images; take full-ft")


def resolve_weights(start: str) -> str:
    """Return the URI of the weights that are meant: a trained model's, or a foreign file's as it is."""
    foreign = start.partition("#")[0].endswith(checkpoint_metadata.TORCH_SUFFIXES)
    return storage.absolute_uri(start) if foreign else resolve_model(start, "student").checkpoint


def finetune_config(settings: RunConfig, plan: str, weights: str, changes: dict[str, object]) -> TrainConfig:
    """Return the training. What neither the run file nor an option states is the recipe's."""
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
    """Return the fitting of a head."""
    return LinearProbeConfig.model_validate(
        {
            **settings.model_dump(include=LINEAR_PROBE_KEYS),
            "architecture": settings.student_architecture,
            "plan": plan,
            "start_weights": weights,
        }
    )
