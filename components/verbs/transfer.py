"""Transfer: a trained model goes on to a run file's class set by the paper's settings for CUB2011, and is measured."""

from pathlib import Path

from components.shared import checkpoints, runfile, storage
from components.shared.errors import Refused
from components.shared.runfile import RunFile
from components.train.train import HeadConfig, TrainConfig, fit_head, train
from components.verbs.measure import measure_on, planned
from components.verbs.trained import trained

SETTINGS = ("full-ft", "fc-only")  # section 5.2, Table 8
# What of a run file a head is fitted by.
OF_THE_IMAGES = {"workdir", "image_column", "label_column", "resolution", "augmentation"}
# And what all layers are trained by; learning rate and epochs are options of the verb.
OF_THE_RUN_FILE = {*OF_THE_IMAGES, "batch_size", "device_batch_size", "weight_decay", "frames", "seed"}


def transfer(path: Path, start: str, setting: str, changes: dict[str, object]) -> None:
    """Take a trained model to a run file's labeled set, with a new head, and measure it on its test set.

    full-ft trains every layer, by the paper's recipe for CUB2011 (Table 13); fc-only leaves them as they are and fits
    the head alone, by logistic regression, its L2 chosen on validation (section 5.2, Table 8). The network is the run
    file's student_architecture; the pool is not looked at. Finished work is found, not repeated.
    """
    settings = runfile.load(path).located()
    if setting == "fc-only":
        refuse_what_a_head_has_not(settings, changes)
    weights, plan = weights_of(start), planned(settings)
    uri = storage.join(plan.folder, "receipt.json")
    if setting == "fc-only":
        measure_on(settings, plan, fit_head(head_of(settings, uri, weights)))
    else:
        measure_on(settings, plan, train(config_of(settings, uri, weights, changes)))


def refuse_what_a_head_has_not(settings: RunFile, changes: dict[str, object]) -> None:
    """Raise Refused where fc-only is given what only full-ft takes."""
    for name in changes:
        raise Refused(f"--{name.replace('_', '-')}: of full-ft; fc-only has none, and its L2 is chosen on validation")
    if settings.frames:
        raise Refused(f"frames: {settings.frames}, and fc-only is of images; take full-ft")


def weights_of(start: str) -> str:
    """Return the URI of the weights that are meant: a trained model's, or a foreign file's as it is."""
    foreign = start.partition("#")[0].endswith(checkpoints.FOREIGN_SUFFIXES)
    return storage.absolute(start) if foreign else trained(start, "student").checkpoint


def config_of(settings: RunFile, plan: str, weights: str, changes: dict[str, object]) -> TrainConfig:
    """Return the training. What neither the run file nor an option states is the recipe's."""
    return TrainConfig.model_validate(
        {
            **settings.model_dump(include=OF_THE_RUN_FILE),
            "recipe": "transfer",
            "architecture": settings.student_architecture,
            "plan": plan,
            "start_weights": weights,
            **changes,
        }
    )


def head_of(settings: RunFile, plan: str, weights: str) -> HeadConfig:
    """Return the fitting of a head."""
    return HeadConfig.model_validate(
        {
            **settings.model_dump(include=OF_THE_IMAGES),
            "architecture": settings.student_architecture,
            "plan": plan,
            "start_weights": weights,
        }
    )
