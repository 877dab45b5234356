"""A trained model, as a verb is told of it: one of a finished run's four, a training's receipt, or a checkpoint."""

from pathlib import Path

from components.shared import runfile, storage
from components.shared.errors import Refused
from components.shared.receipts import EvaluationReceipt, TrainReceipt, load
from components.shared.runfile import RunFile

MODELS = ("teacher", "baseline", "pretrained", "student")
SOURCE = "a finished run's file, a training's receipt (.json) or a .safetensors"


def is_run_file(source: str) -> bool:
    """Say whether a source is a run file rather than what a training left."""
    return source.endswith((".yaml", ".yml"))


def trained(source: str, model: str) -> TrainReceipt:
    """Return the receipt of the model that is meant. Raises Refused where there is none."""
    if is_run_file(source):
        return of_run(runfile.load(Path(source)).located(), model)
    if source.endswith(".json"):
        return load(source, TrainReceipt)
    beside = storage.join(source.rpartition("/")[0] or ".", "receipt.json")
    if not source.endswith(".safetensors") or storage.stat(beside) is None:
        raise Refused(f"{source}: no trained model of ours: expected {SOURCE} with its receipt.json beside it")
    return load(beside, TrainReceipt).model_copy(update={"checkpoint": storage.absolute(source)})


def of_run(settings: RunFile, model: str) -> TrainReceipt:
    """Return the receipt of the model that a run measured. Raises Refused where the run has not finished."""
    evaluation = storage.join(settings.workdir, settings.name, "receipts", "evaluation.json")
    return load(load(evaluation, EvaluationReceipt).models[model].training, TrainReceipt)
