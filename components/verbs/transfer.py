"""Transfer: a trained model goes on to a run file's class set by the paper's recipe for CUB2011, and is measured."""

from pathlib import Path

from components.shared import checkpoints, runfile, storage
from components.shared.runfile import RunFile
from components.train.train import TrainConfig, train
from components.verbs.measure import planned, show
from components.verbs.run import located
from components.verbs.trained import trained

# What of a run file a transfer is trained by; learning rate and epochs are options of the verb.
OF_THE_RUN_FILE = {
    *("workdir", "image_column", "label_column", "batch_size", "device_batch_size", "weight_decay"),
    *("resolution", "augmentation", "frames", "seed"),
}


def transfer(path: Path, start: str, changes: dict[str, object]) -> None:
    """Fine-tune a trained model on a run file's labeled set, with a new head, and measure it on its test set.

    The recipe is the paper's for CUB2011 (Table 13), every layer being trained. The network is the run file's
    student_architecture; the pool is not looked at. Finished work is found, not repeated.
    """
    settings, weights = located(runfile.load(path)), weights_of(start)
    plan = planned(settings)
    receipt = train(config_of(settings, storage.join(plan.folder, "receipt.json"), weights, changes))
    show(settings, plan, receipt)


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
