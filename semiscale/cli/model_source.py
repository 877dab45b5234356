"""A trained model, as a verb is told of it: one of a finished run's four, a training's receipt, or a checkpoint."""

from pathlib import Path

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.storage.documents import load_document

MODELS = ("teacher", "baseline", "pretrained", "student")
SOURCE_HELP = "a finished run's file, a training's receipt (.json) or a .safetensors"


def is_run_file(source: str) -> bool:
    """Say whether a source is a run file rather than what a training left."""
    return source.endswith((".yaml", ".yml"))


def resolve_model(source: str, model: str) -> TrainReceipt:
    """Return the receipt of the model that is meant. Raises InvalidInputError where there is none."""
    if is_run_file(source):
        return model_of_run(run_config.load_run_config(Path(source)).with_absolute_uris(), model)
    if source.endswith(".json"):
        return load_document(source, TrainReceipt)
    beside = storage.join(source.rpartition("/")[0] or ".", "receipt.json")
    if not source.endswith(".safetensors") or storage.head(beside) is None:
        raise InvalidInputError(
            f"{source}: no trained model of ours: expected {SOURCE_HELP} with its receipt.json beside it"
        )
    return load_document(beside, TrainReceipt).model_copy(update={"checkpoint": storage.absolute_uri(source)})


def model_of_run(settings: RunConfig, model: str) -> TrainReceipt:
    """Return the receipt of the model that a run measured. Raises InvalidInputError where the run has not finished."""
    evaluation = storage.join(settings.workdir, settings.name, "receipts", "evaluation.json")
    return load_document(load_document(evaluation, EvaluationReceipt).models[model].training, TrainReceipt)
