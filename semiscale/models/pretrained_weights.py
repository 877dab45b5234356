"""Weights from elsewhere: read without running what they contain, fitted into a network or refused.

A `.pth` file is a pickle, which can run any program; it is read with torch's `weights_only`, which refuses everything
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

STATE_DICT_KEYS = ("state_dict", "model")  # keys that training scripts (timm's, torchvision's) put a state dict under
_EXPECTED = "what torch.save(model.state_dict(), path) writes"
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # `norm.1` is `norm1` since torch 0.4
_SECOND_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception, which only training used


@dataclass(frozen=True)
class StateDictFile:
    """A state dict in torchvision's names, where it came from, and the SHA-256 of the file."""

    uri: str
    sha256: str
    tensors: Mapping[str, Tensor]

    @property
    def source(self) -> str:
        """The file, pinned: what a receipt says and what a run file takes."""
        return f"{self.uri}#sha256={self.sha256}"


def read_state_dict(pinned: CheckpointRef) -> StateDictFile:
    """Read a state dict. The bytes that are hashed are those that are loaded: they are in memory twice while this runs.

    Raises InvalidInputError where the file is missing, has another digest, or holds more than tensors of plain numbers.
    """
    data = storage.read_or_none(pinned.uri)
    if data is None:
        raise InvalidInputError(f"{pinned.uri}: no checkpoint here")
    sha256 = hashlib.sha256(data).hexdigest()
    if not sha256.startswith(pinned.sha256):
        raise InvalidInputError(
            f"{pinned.uri}: its SHA-256 is {sha256}, and {pinned.sha256} was expected; it is another file"
        )
    unpickled = pinned.uri.endswith(TORCH_SUFFIXES)
    tensors = _read_pickle(pinned.uri, data) if unpickled else _safetensors(pinned.uri, data)
    for name, tensor in tensors.items():
        if why := _unsupported_tensor_kind(tensor):
            raise InvalidInputError(
                f"{pinned.uri}: its {name} is {why}; expected {_EXPECTED}, of a model in plain numbers"
            )
    return StateDictFile(pinned.uri, sha256, {_torchvision_name(name): tensor for name, tensor in tensors.items()})


def load_strict(model: nn.Module, architecture: str, weights: StateDictFile) -> None:
    """Put weights into a network, all of them. Raises InvalidInputError where one is missing, unknown or of another
    shape."""
    _load(model, architecture, weights, without=set())


def load_except_head(model: nn.Module, architecture: str, weights: StateDictFile, resolution: int) -> bool:
    """Put weights into a network, all but a head that is missing or of another size; say whether the head was left.

    Raises InvalidInputError where anything but the head does not fit.
    """
    own = model.state_dict()
    heads = networks.head_parameter_names(architecture, 2, resolution)
    left = any(name not in weights.tensors or weights.tensors[name].shape != own[name].shape for name in heads)
    _load(model, architecture, weights, without=heads if left else set())
    return left


def _load(model: nn.Module, architecture: str, weights: StateDictFile, without: set[str]) -> None:
    given = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name not in without and not name.startswith(_SECOND_HEADS)
    }
    own = model.state_dict()
    # Counters of batches, which files from before torch 0.4.1 lack and which nothing reads at a fixed momentum.
    needed = {name for name in own if name not in without and not name.endswith("num_batches_tracked")}
    for name in sorted(needed - given.keys() | given.keys() - own.keys()):
        lack = "has no" if name in needed else "has an unknown"
        raise InvalidInputError(f"{weights.uri}: not a {architecture}: it {lack} {name}")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise InvalidInputError(
                f"{weights.uri}: not a {architecture} of as many classes: its {name} is {_shape(tensor)}, "
                f"expected {_shape(own[name])}"
            )
    model.load_state_dict(given, strict=False)


def _read_pickle(uri: str, data: bytes) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch finds odd it reads all the same, or refuses
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - bytes of any kind may break the reader in any way
        raise InvalidInputError(
            f"{uri}: damaged, or more than tensors, which is not read; expected {_EXPECTED}"
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()) or not content:
        raise InvalidInputError(f"{uri}: not a state dict; expected {_EXPECTED}")
    return content


def _unsupported_tensor_kind(tensor: Tensor) -> str:
    """Say what a tensor is that no network's weights can be; "" where they can."""
    kinds = {
        "sparse": tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "without values": tensor.is_meta,
    }
    found = next((kind for kind, is_it in kinds.items() if is_it), "")
    return found or ("not a number somewhere" if tensor.isnan().any() else "")


def _safetensors(uri: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_safetensors(data)
    except SafetensorError as error:
        raise InvalidInputError(f"{uri}: not a safetensors file: {error}") from None
    return tensors


def _torchvision_name(name: str) -> str:
    return _OLD_DENSENET.sub(r"\1\2", str(name).removeprefix("module."))  # DataParallel's prefix


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
