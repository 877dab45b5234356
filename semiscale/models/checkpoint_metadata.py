"""Checkpoints by URI, without torch: what a model may be taken from, and what is known of it before a GPU is asked for.

Ours are `.safetensors` with a JSON description beside them. Foreign ones are state dicts in torchvision's layout, which
is also the authors' (facebookresearch/semi-supervised-ImageNet1K-models): `.pth`, `.pt`, or `.safetensors` alone.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.data.preprocessing import Preprocessing
from semiscale.storage.documents import Digest, StrictDocument, load_document

TORCH_SUFFIXES = (".pth", ".pt")
_PIN = re.compile(r"^[0-9a-f]{8,64}$")  # torch.hub's file names carry the first eight digits


class CheckpointMetadata(StrictDocument):
    """What a checkpoint's tensors mean: the JSON beside them."""

    architecture: str
    classes: list[str]
    preprocessing: Preprocessing
    recipe: str
    digest: Digest | Literal[""]


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint's URI, and the first digits of the SHA-256 that its bytes must have; none where it is not pinned."""

    uri: str
    sha256: str = ""


def parse_checkpoint_ref(text: str, key: str) -> CheckpointRef:
    """Take `<uri>` or `<uri>#sha256=<digits>` apart. Raises InvalidInputError with the run file's key."""
    uri, mark, digits = text.partition("#sha256=")
    if mark and not _PIN.match(digits):
        raise InvalidInputError(f"{key}: {text}: after #sha256= expected 8 to 64 lower-case hexadecimal digits")
    if not uri.endswith((*TORCH_SUFFIXES, ".safetensors")):
        raise InvalidInputError(f"{key}: {uri}: expected a .safetensors, .pth or .pt file")
    return CheckpointRef(uri, digits)


def checkpoint_version(text: str, key: str) -> str:
    """Return what changes when a checkpoint's bytes do. Raises InvalidInputError where there is nothing at its URI."""
    one = parse_checkpoint_ref(text, key)
    entry = storage.head(one.uri)
    if entry is None:
        raise InvalidInputError(f"{key}: {one.uri}: no checkpoint here")
    return entry.version


def read_metadata(uri: str) -> CheckpointMetadata | None:
    """Return the description of one of our checkpoints, None for a foreign one. Raises InvalidInputError for another
    JSON."""
    beside = uri.removesuffix(".safetensors") + ".json"
    if uri.endswith(TORCH_SUFFIXES) or storage.head(beside) is None:
        return None
    return load_document(beside, CheckpointMetadata)


def read_class_names(uri: str, key: str) -> list[str]:
    """Read a list of class names, one a line. Raises InvalidInputError where it is missing, no text, or names a
    class twice."""
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError(f"{key}: {uri}: no such file; expected one class name a line")
    try:
        names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InvalidInputError(f"{key}: {uri}: not UTF-8; expected one class name a line") from None
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidInputError(f"{key}: {uri}: {twice[0]!r} is listed more than once; a class is named on one line")
    return names


def check_compatible(uri: str, class_list: str, wanted: CheckpointMetadata) -> None:
    """Raise InvalidInputError where what is known of a ready-made model, without its tensors, is not what a run needs.

    One of ours is described beside its tensors. Of a foreign one `class_list` may name the classes, the URI of a text
    file; without it only their number and the accuracy speak for them.
    """
    if found := read_metadata(uri):
        check_metadata_matches(uri, found, wanted)
    if class_list:
        check_same_classes(class_list, read_class_names(class_list, "teacher_classes"), wanted.classes)


def check_metadata_matches(uri: str, found: CheckpointMetadata, wanted: CheckpointMetadata) -> None:
    """Raise InvalidInputError where a checkpoint is not of the architecture, the classes and the preprocessing of a
    run."""
    if found.architecture != wanted.architecture:
        raise InvalidInputError(
            f"{uri}: a {found.architecture}, and the run file says {wanted.architecture}; change it there"
        )
    check_same_classes(uri, found.classes, wanted.classes)
    if found.preprocessing != wanted.preprocessing:
        raise InvalidInputError(
            f"{uri}: was trained on {_shown(found)}, the run is of {_shown(wanted)}; change the run file"
        )


def check_same_classes(uri: str, found: list[str], wanted: list[str]) -> None:
    """Raise InvalidInputError where a model's classes are not the labeled set's, in their order."""
    if len(found) != len(wanted):
        raise InvalidInputError(f"{uri}: {len(found):,} classes, and the labeled set has {len(wanted):,}")
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one != other:
            raise InvalidInputError(
                f"{uri}: its class {number} is {one!r} and the labeled set's is {other!r}; `classes` sets the order"
            )


def _shown(description: CheckpointMetadata) -> str:
    one = description.preprocessing
    frames = f"{one.frames} frames of " if one.frames else ""
    pixels = f"{frames}{one.resolution} x {one.resolution} pixels"
    return f"{pixels}, {one.augmentation}, mean {one.mean}, deviation {one.std}"
