"""Read foreign weights safely and load them into a network.

A `.pth` file is a pickle, which can run any program. It is read with torch's `weights_only`, which refuses everything
but tensors and plain containers.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.models import networks
from semiscale.models.checkpoint_metadata import TORCH_SUFFIXES, CheckpointRef

# Keys under which the training scripts of timm and torchvision store a state dict.
STATE_DICT_KEYS = ("state_dict", "model")
_HOW_TO_SAVE = "Save it with torch.save(model.state_dict(), path)."
# `norm.1` is called `norm1` since torch 0.4.
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# The auxiliary heads of GoogLeNet and Inception are used in training only.
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class StateDictFile:
    """State dict with torchvision's names, its URI, and the SHA-256 of the file."""

    uri: str
    sha256: str
    tensors: Mapping[str, Tensor]

    @property
    def source(self) -> str:
        """Return the pinned URI that receipts store and that run files take."""
        return f"{self.uri}#sha256={self.sha256}"


def read_state_dict(pinned: CheckpointRef) -> StateDictFile:
    """Read a state dict and check its digest.

    The hashed bytes are the loaded bytes, so that the file cannot change in between.

    Cost: twice the size of the file in memory.

    Raises:
        InvalidInputError: The file is missing (SEMI-E130), has another digest (SEMI-E146), cannot be read (SEMI-E148,
            SEMI-E149, SEMI-E150), or holds tensors that are not plain numbers (SEMI-E147).
    """
    data = storage.read_or_none(pinned.uri)
    if data is None:
        raise InvalidInputError("SEMI-E130", f"{pinned.uri}: There is no checkpoint. Give the URI of one.")
    sha256 = hashlib.sha256(data).hexdigest()
    if not sha256.startswith(pinned.sha256):
        raise InvalidInputError(
            "SEMI-E146",
            f"{pinned.uri}: The SHA-256 is {sha256} instead of {pinned.sha256}. Restore the file or change the pin.",
        )
    is_pickle = pinned.uri.endswith(TORCH_SUFFIXES)
    tensors = _read_pickle(pinned.uri, data) if is_pickle else _read_safetensors(pinned.uri, data)
    for name, tensor in tensors.items():
        if reason := _unsupported_tensor_reason(tensor):
            raise InvalidInputError(
                "SEMI-E147", f"{pinned.uri}: The tensor {name} {reason}. Save a model of dense, finite numbers."
            )
    return StateDictFile(pinned.uri, sha256, {_to_torchvision_name(name): tensor for name, tensor in tensors.items()})


def load_strict(model: nn.Module, architecture: str, weights: StateDictFile) -> None:
    """Load all weights into a model.

    Args:
        model: Model that is changed in place.
        architecture: Name of its architecture.
        weights: State dict of the same network.

    Raises:
        InvalidInputError: A tensor is missing, unknown or of another shape (SEMI-E131).
    """
    _load(model, architecture, weights, excluded=set())


def load_except_head(model: nn.Module, architecture: str, weights: StateDictFile, resolution: int) -> bool:
    """Load weights into a model, except for a head that is missing or of another size.

    Args:
        model: Model that is changed in place.
        architecture: Name of its architecture.
        weights: State dict of the network, possibly for other classes.
        resolution: Pixels on a side of the model's images.

    Returns:
        Whether the head keeps the model's own weights.

    Raises:
        InvalidInputError: Another tensor is missing, unknown or of another shape (SEMI-E131).
    """
    own = model.state_dict()
    heads = networks.head_parameter_names(architecture, 2, resolution)
    skips_head = any(name not in weights.tensors or weights.tensors[name].shape != own[name].shape for name in heads)
    _load(model, architecture, weights, excluded=heads if skips_head else set())
    return skips_head


def _load(model: nn.Module, architecture: str, weights: StateDictFile, excluded: set[str]) -> None:
    given = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name not in excluded and not name.startswith(_AUXILIARY_HEADS)
    }
    own = model.state_dict()
    # Files from before torch 0.4.1 lack the counters of batches. A fixed momentum does not read them.
    needed = {name for name in own if name not in excluded and not name.endswith("num_batches_tracked")}
    for name in sorted(needed - given.keys() | given.keys() - own.keys()):
        problem = "has no" if name in needed else "has an unknown"
        raise InvalidInputError(
            "SEMI-E131", f"{weights.uri}: The file {problem} tensor {name}. Give the weights of a {architecture}."
        )
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise InvalidInputError(
                "SEMI-E131",
                f"{weights.uri}: The tensor {name} is {_format_shape(tensor)} instead of {_format_shape(own[name])}. "
                f"Give the weights of a {architecture} with as many classes as the labeled set.",
            )
    model.load_state_dict(given, strict=False)


def _read_pickle(uri: str, data: bytes) -> dict[str, Tensor]:
    try:
        # torch reads or refuses a file whatever it warns about.
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Arbitrary bytes may make the reader raise any error.
    except Exception:  # noqa: BLE001
        raise InvalidInputError(
            "SEMI-E148", f"{uri}: The file is damaged or contains more than tensors. {_HOW_TO_SAVE}"
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()) or not content:
        raise InvalidInputError("SEMI-E149", f"{uri}: The file is not a state dict. {_HOW_TO_SAVE}")
    return content


def _unsupported_tensor_reason(tensor: Tensor) -> str:
    """Return why a tensor cannot be a network's weights, or an empty string."""
    reasons = {
        "is sparse": tensor.layout != torch.strided,
        "is quantized": tensor.is_quantized,
        "is complex": tensor.is_complex(),
        "has no values": tensor.is_meta,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), "")
    return reason or ("contains NaN" if tensor.isnan().any() else "")


def _read_safetensors(uri: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_safetensors(data)
    except SafetensorError as error:
        raise InvalidInputError(
            "SEMI-E150", f"{uri}: The file is not a safetensors file ({error}). Copy or save it again."
        ) from None
    return tensors


def _to_torchvision_name(name: str) -> str:
    # DataParallel adds the prefix.
    return _OLD_DENSENET.sub(r"\1\2", str(name).removeprefix("module."))


def _format_shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
