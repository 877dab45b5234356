"""Check checkpoints by their URIs, without torch and before a GPU is requested.

A checkpoint of this program is a `.safetensors` file with a JSON description of the same name. A foreign checkpoint is
a state dict in torchvision's layout, which is also the layout of the authors' released models
(facebookresearch/semi-supervised-ImageNet1K-models). It is a `.pth` or `.pt` file, or a `.safetensors` file without a
description.
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
# torch.hub puts the first eight digits of the SHA-256 into file names.
_SHA256_PREFIX = re.compile(r"^[0-9a-f]{8,64}$")


class CheckpointMetadata(StrictDocument):
    """Description of a checkpoint, stored as the JSON file of its name."""

    architecture: str
    classes: list[str]
    preprocessing: Preprocessing
    recipe: str
    digest: Digest | Literal[""]


@dataclass(frozen=True)
class CheckpointRef:
    """URI of a checkpoint, and the first digits of its SHA-256 if it is pinned."""

    uri: str
    sha256: str = ""


def parse_checkpoint_ref(text: str, key: str) -> CheckpointRef:
    """Parse `<uri>` or `<uri>#sha256=<digits>`.

    Args:
        text: Value from the run file.
        key: Key of the value in the run file.

    Raises:
        InvalidInputError: The digits (SEMI-E132) or the suffix (SEMI-E133) are not valid.
    """
    uri, mark, digits = text.partition("#sha256=")
    if mark and not _SHA256_PREFIX.match(digits):
        raise InvalidInputError(
            "SEMI-E132",
            f"{key}: {text} has no valid SHA-256. Write 8 to 64 lower-case hexadecimal digits after #sha256=.",
        )
    if not uri.endswith((*TORCH_SUFFIXES, ".safetensors")):
        raise InvalidInputError(
            "SEMI-E133", f"{key}: {uri} is not a checkpoint file. Give a .safetensors, .pth or .pt file."
        )
    return CheckpointRef(uri, digits)


def checkpoint_version(text: str, key: str) -> str:
    """Return the store's version of a checkpoint, which changes when its bytes do.

    Args:
        text: Value from the run file, as for `parse_checkpoint_ref`.
        key: Key of the value in the run file.

    Raises:
        InvalidInputError: The value is not valid, or there is no checkpoint (SEMI-E130).
    """
    ref = parse_checkpoint_ref(text, key)
    entry = storage.head(ref.uri)
    if entry is None:
        raise InvalidInputError("SEMI-E130", f"{key}: {ref.uri} does not exist. Give the URI of a checkpoint.")
    return entry.version


def read_metadata(uri: str) -> CheckpointMetadata | None:
    """Read the description of a checkpoint, or return None for a foreign one.

    Raises:
        InvalidInputError: The JSON file of the checkpoint's name is not a description.
    """
    description_uri = uri.removesuffix(".safetensors") + ".json"
    if uri.endswith(TORCH_SUFFIXES) or storage.head(description_uri) is None:
        return None
    return load_document(description_uri, CheckpointMetadata)


def read_class_names(uri: str, key: str) -> list[str]:
    """Read a list of class names, one on each line.

    Args:
        uri: URI of a UTF-8 text file.
        key: Key of the URI in the run file.

    Raises:
        InvalidInputError: The file is missing (SEMI-E134), is not UTF-8 (SEMI-E135), or repeats a class (SEMI-E136).
    """
    data = storage.read_or_none(uri)
    if data is None:
        raise InvalidInputError(
            "SEMI-E134", f"{key}: {uri} does not exist. Give a text file with one class name on each line."
        )
    try:
        names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InvalidInputError(
            "SEMI-E135", f"{key}: {uri} is not UTF-8 text. Give a text file with one class name on each line."
        ) from None
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InvalidInputError(
            "SEMI-E136", f"{key}: {uri} lists {repeated[0]!r} more than once. Name each class on one line."
        )
    return names


def check_compatible(uri: str, class_list: str, wanted: CheckpointMetadata) -> None:
    """Check a ready-made model against a run without reading its tensors.

    A checkpoint of this program has a description. A foreign one can only be checked if its classes are listed.
    Without the list, training later checks the number of classes and the accuracy.

    Args:
        uri: URI of the checkpoint.
        class_list: URI of a text file with the classes of the checkpoint, or an empty string.
        wanted: Description that the run needs.

    Raises:
        InvalidInputError: Architecture, classes or preprocessing differ.
    """
    if metadata := read_metadata(uri):
        check_metadata_matches(uri, metadata, wanted)
    if class_list:
        check_same_classes(class_list, read_class_names(class_list, "teacher_classes"), wanted.classes)


def check_metadata_matches(uri: str, actual: CheckpointMetadata, wanted: CheckpointMetadata) -> None:
    """Check a checkpoint's architecture, classes and preprocessing.

    Args:
        uri: URI of the checkpoint.
        actual: Its description.
        wanted: Description that the run needs.

    Raises:
        InvalidInputError: Architecture (SEMI-E137), classes (SEMI-E138) or preprocessing (SEMI-E139) differ.
    """
    if actual.architecture != wanted.architecture:
        raise InvalidInputError(
            "SEMI-E137",
            f"{uri}: The checkpoint is a {actual.architecture}, and the run file says {wanted.architecture}. "
            "Change the run file.",
        )
    check_same_classes(uri, actual.classes, wanted.classes)
    if actual.preprocessing != wanted.preprocessing:
        raise InvalidInputError(
            "SEMI-E139",
            f"{uri}: The checkpoint was trained on {_describe_preprocessing(actual)}, and the run uses "
            f"{_describe_preprocessing(wanted)}. Change the run file.",
        )


def check_same_classes(uri: str, actual: list[str], wanted: list[str]) -> None:
    """Check that a model's classes are those of the labeled set, in the same order.

    Args:
        uri: URI of the checkpoint or of its list of classes.
        actual: Classes of the model.
        wanted: Classes of the labeled set.

    Raises:
        InvalidInputError: The classes differ (SEMI-E138).
    """
    if len(actual) != len(wanted):
        raise InvalidInputError(
            "SEMI-E138",
            f"{uri}: The model has {len(actual):,} classes, and the labeled set has {len(wanted):,}. "
            "Give a model of the labeled set's classes.",
        )
    for number, (own, other) in enumerate(zip(actual, wanted, strict=True)):
        if own != other:
            raise InvalidInputError(
                "SEMI-E138",
                f"{uri}: Class {number} of the model is {own!r}, and that of the labeled set is {other!r}. "
                "Set their order with the key `classes`.",
            )


def _describe_preprocessing(description: CheckpointMetadata) -> str:
    preprocessing = description.preprocessing
    frames = f"{preprocessing.frames} frames of " if preprocessing.frames else ""
    pixels = f"{frames}{preprocessing.resolution} x {preprocessing.resolution} pixels"
    return f"{pixels}, {preprocessing.augmentation}, mean {preprocessing.mean}, deviation {preprocessing.std}"
