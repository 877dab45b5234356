"""Save and load models as safetensors with a JSON description."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

from semiscale import storage
from semiscale.common import malloc
from semiscale.common.cpu import intra_op_threads
from semiscale.common.errors import InvalidInputError
from semiscale.models.checkpoint_metadata import CheckpointMetadata, read_metadata
from semiscale.models.networks import build_model


def default_device() -> torch.device:
    """Return the GPU of this machine, or its CPU if it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configure_torch() -> None:
    """Configure torch for this process, before its first computation.

    The number of CPU threads is OMP_NUM_THREADS. By default torch would use all cores in each of two processes. If
    networks run on the CPU, freed memory is retained from step to step.
    """
    torch.set_num_threads(intra_op_threads())
    if default_device().type == "cpu":
        malloc.retain_freed_memory()


def save_model(model: nn.Module, description: CheckpointMetadata, folder: str) -> str:
    """Write the tensors and the description of a model.

    Args:
        model: Model to save, on any device.
        description: Description of the model.
        folder: URI of the folder of `model.safetensors` and `model.json`.

    Returns:
        URI of the tensors.
    """
    uri = storage.join(folder, "model.safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(folder, "model.json"), description.model_dump_json(indent=1).encode())
    # The file is written to disk first. The largest of the paper's networks has 3.3 GB, too much for two copies in
    # memory.
    with tempfile.TemporaryDirectory() as local_folder:
        path = Path(local_folder) / "model.safetensors"
        save_file(tensors, path)
        storage.upload(path, uri)
    return uri


def load_model(uri: str) -> tuple[nn.Module, CheckpointMetadata]:
    """Load a model of this program and its description.

    Args:
        uri: URI of the `.safetensors` file. Its description is the `.json` file of the same name.

    Returns:
        The model on the CPU, and its description.

    Raises:
        InvalidInputError: A file is missing (SEMI-E130), or the tensors belong to another network (SEMI-E131).
    """
    description = read_metadata(uri)
    tensors = storage.read_or_none(uri)
    if description is None or tensors is None:
        raise InvalidInputError(
            "SEMI-E130", f"{uri}: There is no checkpoint. Give a .safetensors file that has a .json file of its name."
        )
    model = build_model(description.architecture, len(description.classes), description.preprocessing.resolution)
    try:
        model.load_state_dict(load_tensors(tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InvalidInputError(
            "SEMI-E131",
            f"{uri}: The tensors are not those of a {description.architecture} ({reason}). Give its own weights.",
        ) from None
    return model, description
