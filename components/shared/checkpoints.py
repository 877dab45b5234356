"""Checkpoints by URI, without torch: what a model may be taken from, and what is known of it before a GPU is asked for.

Ours are `.safetensors` with a JSON description beside them. Foreign ones are state dicts in torchvision's layout, which
is also the authors' (facebookresearch/semi-supervised-ImageNet1K-models): `.pth`, `.pt`, or `.safetensors` alone.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from components.shared import storage
from components.shared.errors import Refused
from components.shared.receipts import Digest, Document, Preprocessing, load

FOREIGN_SUFFIXES = (".pth", ".pt")
_PIN = re.compile(r"^[0-9a-f]{8,64}$")  # torch.hub's file names carry the first eight digits


class Description(Document):
    """What a checkpoint's tensors mean: the JSON beside them."""

    architecture: str
    classes: list[str]
    preprocessing: Preprocessing
    recipe: str
    digest: Digest | Literal[""]


@dataclass(frozen=True)
class Pinned:
    """A checkpoint's URI, and the first digits of the SHA-256 that its bytes must have; none where it is not pinned."""

    uri: str
    sha256: str = ""


def pinned(text: str, key: str) -> Pinned:
    """Take `<uri>` or `<uri>#sha256=<digits>` apart. Raises Refused with the run file's key."""
    uri, mark, digits = text.partition("#sha256=")
    if mark and not _PIN.match(digits):
        raise Refused(f"{key}: {text}: after #sha256= expected 8 to 64 lower-case hexadecimal digits")
    if not uri.endswith((*FOREIGN_SUFFIXES, ".safetensors")):
        raise Refused(f"{key}: {uri}: expected a .safetensors, .pth or .pt file")
    return Pinned(uri, digits)


def version(text: str, key: str) -> str:
    """Return what changes when a checkpoint's bytes do. Raises Refused where there is nothing at its URI."""
    one = pinned(text, key)
    entry = storage.stat(one.uri)
    if entry is None:
        raise Refused(f"{key}: {one.uri}: no checkpoint here")
    return entry.version


def described(uri: str) -> Description | None:
    """Return the description of one of our checkpoints, None for a foreign one. Raises Refused for another JSON."""
    beside = uri.removesuffix(".safetensors") + ".json"
    if uri.endswith(FOREIGN_SUFFIXES) or storage.stat(beside) is None:
        return None
    return load(beside, Description)


def class_names(uri: str, key: str) -> list[str]:
    """Read a list of class names, one a line. Raises Refused where it is missing, no text, or names a class twice."""
    data = storage.read_if_there(uri)
    if data is None:
        raise Refused(f"{key}: {uri}: no such file; expected one class name a line")
    try:
        names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise Refused(f"{key}: {uri}: not UTF-8; expected one class name a line") from None
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Refused(f"{key}: {uri}: {twice[0]!r} is listed more than once; a class is named on one line")
    return names


def refuse_unlike(uri: str, class_list: str, wanted: Description) -> None:
    """Raise Refused where what is known of a ready-made model, without its tensors, is not what a run needs.

    One of ours is described beside its tensors. Of a foreign one `class_list` may name the classes, the URI of a text
    file; without it only their number and the accuracy speak for them.
    """
    if found := described(uri):
        refuse_other(uri, found, wanted)
    if class_list:
        refuse_other_classes(class_list, class_names(class_list, "teacher_classes"), wanted.classes)


def refuse_other(uri: str, found: Description, wanted: Description) -> None:
    """Raise Refused where a checkpoint is not of the architecture, the classes and the preprocessing of a run."""
    if found.architecture != wanted.architecture:
        raise Refused(f"{uri}: a {found.architecture}, and the run file says {wanted.architecture}; change it there")
    refuse_other_classes(uri, found.classes, wanted.classes)
    if found.preprocessing != wanted.preprocessing:
        raise Refused(f"{uri}: was trained on {_shown(found)}, the run is of {_shown(wanted)}; change the run file")


def refuse_other_classes(uri: str, found: list[str], wanted: list[str]) -> None:
    """Raise Refused where a model's classes are not the labeled set's, in their order."""
    if len(found) != len(wanted):
        raise Refused(f"{uri}: {len(found):,} classes, and the labeled set has {len(wanted):,}")
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one != other:
            raise Refused(
                f"{uri}: its class {number} is {one!r} and the labeled set's is {other!r}; `classes` sets the order"
            )


def _shown(description: Description) -> str:
    one = description.preprocessing
    frames = f"{one.frames} frames of " if one.frames else ""
    pixels = f"{frames}{one.resolution} x {one.resolution} pixels"
    return f"{pixels}, {one.augmentation}, mean {one.mean}, deviation {one.std}"
