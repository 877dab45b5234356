"""The argument that names a trained model: a finished run, a receipt of a training, or a checkpoint."""

from pathlib import Path

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.storage.documents import load_document

MODEL_NAMES = ("teacher", "baseline", "pretrained", "student")
SOURCE_HELP = "a finished run's file, a training's receipt (.json) or a .safetensors"


def is_run_file(source: str) -> bool:
    """Return whether a source is a run file, not an output of a training."""
    return source.endswith((".yaml", ".yml"))


def resolve_model(source: str, model: str) -> TrainReceipt:
    """Return the receipt of the training of a model.

    Args:
        source: A run file, a receipt of a training (.json) or a checkpoint (.safetensors).
        model: One of MODEL_NAMES, for a run file.

    Raises:
        InvalidInputError: There is no such model.
    """
    if is_run_file(source):
        return model_of_run(run_config.load_run_config(Path(source)).with_absolute_uris(), model)
    if source.endswith(".json"):
        return load_document(source, TrainReceipt)
    receipt = storage.join(source.rpartition("/")[0] or ".", "receipt.json")
    if not source.endswith(".safetensors") or storage.head(receipt) is None:
        raise InvalidInputError(
            "SEMI-E426",
            f"{source}: This is not a trained model of this program. Name {SOURCE_HELP} with its receipt.json in the "
            "same folder.",
        )
    return load_document(receipt, TrainReceipt).model_copy(update={"checkpoint": storage.absolute_uri(source)})


def model_of_run(settings: RunConfig, model: str) -> TrainReceipt:
    """Return the receipt of the training of a model that a finished run measured.

    Args:
        settings: The run file.
        model: One of MODEL_NAMES.

    Raises:
        InvalidInputError: The run has not finished.
    """
    evaluation = storage.join(settings.workdir, settings.name, "receipts", "evaluation.json")
    return load_document(load_document(evaluation, EvaluationReceipt).models[model].training, TrainReceipt)
