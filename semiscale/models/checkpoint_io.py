"""The models: built by name, run on images, saved and read as safetensors beside a JSON description.

What builds, fits, trains or exports a network knows torch's module system; everything else sees images in and logits
out.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from semiscale import storage
from semiscale.common import malloc
from semiscale.common.cpu import intra_op_threads
from semiscale.common.errors import InvalidInputError
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch
from semiscale.models.checkpoint_metadata import CheckpointMetadata, read_metadata
from semiscale.models.networks import build_model

__all__ = [
    "CheckpointMetadata",
    "build_model",
    "configure_torch",
    "default_device",
    "load_model",
    "mean_std_tensors",
    "save_model",
    "to_channels_first",
    "to_normalized_batch",
]


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


def to_normalized_batch(images_BHWC: Batch, preprocessing: Preprocessing, to: torch.device) -> Tensor:
    """Move a batch of uint8 pixels to a device and normalise it there: a quarter of the bytes to move."""
    pixels_BCHW = to_channels_first(torch.from_numpy(images_BHWC).to(to, non_blocking=True), preprocessing)
    mean, std = mean_std_tensors(preprocessing, to)
    return (pixels_BCHW.float() / 255 - mean) / std


def to_channels_first(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return images_BHWC as BCHW; clips, THWC behind any other axes, as CTHW."""
    return pixels.movedim(-1, -4 if preprocessing.frames else -3)


def mean_std_tensors(preprocessing: Preprocessing, to: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the channels, to be taken from images or clips whose channels are first."""
    shape = (3, 1, 1, 1) if preprocessing.frames else (3, 1, 1)
    return tuple(torch.tensor(one, device=to).view(shape) for one in (preprocessing.mean, preprocessing.std))  # type: ignore[return-value]


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
