"""The demo: handwritten digits that come with scikit-learn, written out as image files and run through the pipeline.

Eight digits are the classes. The pool also holds what is of no class: the other two digits, and patches of photographs.
"""

import io
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from semiscale.cli.compile import ROOT
from semiscale.cli.run_local import run
from semiscale.common.errors import InvalidInputError

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven")  # eight and nine are distractors
TEST_PER_CLASS = 60
VALIDATION_PER_CLASS = 20
LABELED_PER_CLASS = 3
PATCHES = 500
IMAGES_PER_SHARD = 128
RUN_FILE = ROOT / "manifests" / "runs" / "demo.yaml"
IMAGES = Path("runs/demo-images")

Gray = NDArray[np.uint8]


def demo() -> None:
    """Write the demo's images, if they are not there, and run manifests/runs/demo.yaml."""
    if not IMAGES.exists():
        write_images(IMAGES, seed=0)
    run(RUN_FILE)


def write_images(folder: Path, seed: int) -> None:
    """Write one split of the digits: class folders (labeled), Parquet (validation), tars (test and unlabeled).

    The test images are the same for every seed, so that no seed can choose a setting on another's test set; the rest is
    drawn anew. All sets are disjoint.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInputError(f"{folder}: not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        split = sample_splits(seed)
        target = Path(aside) / "images"
        write_class_folders(target / "labeled", split["labeled"])
        write_parquet(target / "validation.parquet", split["validation"])
        write_tars(target / "test", split["test"], labels=True)
        write_tars(target / "unlabeled", split["unlabeled"], labels=False)
        (target / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        shutil.move(target, folder)


def sample_splits(seed: int) -> dict[str, list[tuple[Gray, int]]]:
    """Return the four disjoint sets, lists of (8x8 gray pixels, digit), the digit -1 for a patch of a photograph."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    fixed, drawn = np.random.default_rng(0), np.random.default_rng([seed, 1])
    split: dict[str, list[tuple[Gray, int]]] = {name: [] for name in ("labeled", "validation", "test", "unlabeled")}
    for digit in range(10):
        places = fixed.permutation(np.flatnonzero(digits.target == digit))
        if digit < len(CLASSES):
            test, rest = places[:TEST_PER_CLASS], drawn.permutation(places[TEST_PER_CLASS:])
            ends = np.cumsum([LABELED_PER_CLASS, VALIDATION_PER_CLASS])
            parts = dict(zip(("labeled", "validation", "unlabeled"), np.split(rest, ends), strict=True))
            parts["test"] = test
        else:
            parts = {"unlabeled": places}
        for name, chosen in parts.items():
            split[name].extend((pixels[place], digit) for place in chosen)
    split["unlabeled"].extend((patch, -1) for patch in photo_patches(drawn))
    split["unlabeled"] = [split["unlabeled"][place] for place in drawn.permutation(len(split["unlabeled"]))]
    return split


def photo_patches(rng: np.random.Generator) -> list[Gray]:
    """Cut gray patches out of scikit-learn's two photographs, at random places, reduced to 8x8 pixels."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph).convert("L") for photograph in load_sample_images().images]
    cut = []
    for _ in range(PATCHES):
        photograph = photographs[rng.integers(len(photographs))]
        size = int(rng.integers(8, 129))
        left, top = int(rng.integers(photograph.width - size)), int(rng.integers(photograph.height - size))
        patch = photograph.crop((left, top, left + size, top + size)).resize((8, 8), Image.Resampling.BILINEAR)
        cut.append(np.asarray(patch))
    return cut


def encode_png(pixels: Gray) -> bytes:
    """Encode gray pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_class_folders(folder: Path, images: list[tuple[Gray, int]]) -> None:
    """Write `<class>/<number>.png`."""
    for number, (pixels, digit) in enumerate(images):
        path = folder / CLASSES[digit] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))


def write_parquet(path: Path, images: list[tuple[Gray, int]]) -> None:
    """Write columns `image` (PNG bytes) and `label` (class name)."""
    table = {"image": [encode_png(pixels) for pixels, _ in images], "label": [CLASSES[digit] for _, digit in images]}
    pq.write_table(pa.table(table), path)


def write_tars(folder: Path, images: list[tuple[Gray, int]], labels: bool) -> None:
    """Write WebDataset tars, with `.cls` members where `labels`."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(images), IMAGES_PER_SHARD)):
        with tarfile.open(folder / f"shard-{number:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, (pixels, digit) in enumerate(images[start : start + IMAGES_PER_SHARD], start=start):
                add_member(tar, f"{place:06}.png", encode_png(pixels))
                if labels:
                    add_member(tar, f"{place:06}.cls", str(digit).encode())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append one file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
