"""The models: built by name, run on images, saved and read as safetensors beside a JSON description.

What builds, fits, trains or exports a network knows torch's module system; everything else sees images in and logits
out.
"""

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
    """Return the accelerator of this machine, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configure_torch() -> None:
    """Set torch up for this process, before it computes.

    As many CPU threads as OMP_NUM_THREADS says: torch alone would take all cores for each of two processes. Where a
    network computes on the CPU, memory is kept from step to step.
    """
    torch.set_num_threads(intra_op_threads())
    if default_device().type == "cpu":
        malloc.retain_freed_memory()


def save_model(model: nn.Module, description: CheckpointMetadata, folder: str) -> str:
    """Write a model's tensors and description; returns the URI of the tensors."""
    uri = storage.join(folder, "model.safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(folder, "model.json"), description.model_dump_json(indent=1).encode())
    # By way of the disk: the largest of the paper's networks is 3.3 GB, too much to hold twice.
    with tempfile.TemporaryDirectory() as folder_here:
        path = Path(folder_here) / "model.safetensors"
        save_file(tensors, path)
        storage.upload(path, uri)
    return uri


def load_model(uri: str) -> tuple[nn.Module, CheckpointMetadata]:
    """Read a model and its description. Raises InvalidInputError where the tensors are not the described network's."""
    description = read_metadata(uri)
    tensors = storage.read_or_none(uri)
    if description is None or tensors is None:
        raise InvalidInputError(f"{uri}: no checkpoint here; expected .safetensors with a .json beside it")
    model = build_model(description.architecture, len(description.classes), description.preprocessing.resolution)
    try:
        model.load_state_dict(load_tensors(tensors))
    except RuntimeError as error:
        raise InvalidInputError(
            f"{uri}: not a {description.architecture}: {str(error).splitlines()[-1].strip()}"
        ) from None
    return model, description
