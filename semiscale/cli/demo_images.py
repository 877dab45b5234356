"""The verb `demo-images`: write handwritten digits as image files in the formats that the pipeline reads.

Eight digits are the classes. The pool also holds images of no class: the other two digits and patches of photographs.
The digits and the photographs come with scikit-learn.
"""

import argparse
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

from semiscale.cli.command import Command, Options, non_negative_int
from semiscale.common.errors import InvalidInputError

# The digits eight and nine belong to no class.
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven")
TEST_PER_CLASS = 60
VALIDATION_PER_CLASS = 20
LABELED_PER_CLASS = 3
PATCHES = 500
IMAGES_PER_SHARD = 128

GrayImage = NDArray[np.uint8]


def write_images(folder: Path, seed: int) -> None:
    """Write one split of the digits as class folders, Parquet and WebDataset tars.

    The labeled set is class folders, the validation set is a Parquet file, the test set and the pool are tars. All
    sets are disjoint. The test images are the same for every seed, so that no seed can choose a setting on the test
    set of another seed. All other sets are drawn anew.

    Args:
        folder: Folder to write. It must be missing or empty.
        seed: Seed of the split.

    Raises:
        InvalidInputError: The folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInputError("SEMI-E439", f"{folder}: The folder is not empty. Name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The images are written to a temporary folder and moved at the end, so that an existing folder is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        split = sample_splits(seed)
        target = Path(temporary) / "images"
        write_class_folders(target / "labeled", split["labeled"])
        write_parquet(target / "validation.parquet", split["validation"])
        write_tars(target / "test", split["test"], labels=True)
        write_tars(target / "unlabeled", split["unlabeled"], labels=False)
        (target / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        shutil.move(target, folder)


def sample_splits(seed: int) -> dict[str, list[tuple[GrayImage, int]]]:
    """Return the four disjoint sets.

    Args:
        seed: Seed of everything but the test set.

    Returns:
        For each set a list of (8x8 gray pixels, digit). The digit of a patch of a photograph is -1.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    fixed, drawn = np.random.default_rng(0), np.random.default_rng([seed, 1])
    split: dict[str, list[tuple[GrayImage, int]]] = {
        name: [] for name in ("labeled", "validation", "test", "unlabeled")
    }
    for digit in range(10):
        indices = fixed.permutation(np.flatnonzero(digits.target == digit))
        if digit < len(CLASSES):
            test, rest = indices[:TEST_PER_CLASS], drawn.permutation(indices[TEST_PER_CLASS:])
            ends = np.cumsum([LABELED_PER_CLASS, VALIDATION_PER_CLASS])
            parts = dict(zip(("labeled", "validation", "unlabeled"), np.split(rest, ends), strict=True))
            parts["test"] = test
        else:
            parts = {"unlabeled": indices}
        for name, chosen in parts.items():
            split[name].extend((pixels[index], digit) for index in chosen)
    split["unlabeled"].extend((patch, -1) for patch in photo_patches(drawn))
    split["unlabeled"] = [split["unlabeled"][index] for index in drawn.permutation(len(split["unlabeled"]))]
    return split


def photo_patches(rng: np.random.Generator) -> list[GrayImage]:
    """Cut random gray patches out of two photographs and reduce them to 8x8."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph).convert("L") for photograph in load_sample_images().images]
    patches = []
    for _ in range(PATCHES):
        photograph = photographs[rng.integers(len(photographs))]
        size = int(rng.integers(8, 129))
        left, top = int(rng.integers(photograph.width - size)), int(rng.integers(photograph.height - size))
        patch = photograph.crop((left, top, left + size, top + size)).resize((8, 8), Image.Resampling.BILINEAR)
        patches.append(np.asarray(patch))
    return patches


def encode_png(pixels: GrayImage) -> bytes:
    """Encode gray pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_class_folders(folder: Path, images: list[tuple[GrayImage, int]]) -> None:
    """Write `<class>/<number>.png`."""
    for number, (pixels, digit) in enumerate(images):
        path = folder / CLASSES[digit] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))


def write_parquet(path: Path, images: list[tuple[GrayImage, int]]) -> None:
    """Write columns `image` (PNG bytes) and `label` (class name)."""
    table = {"image": [encode_png(pixels) for pixels, _ in images], "label": [CLASSES[digit] for _, digit in images]}
    pq.write_table(pa.table(table), path)


def write_tars(folder: Path, images: list[tuple[GrayImage, int]], labels: bool) -> None:
    """Write WebDataset tars.

    Args:
        folder: New folder for the tars.
        images: Gray pixels and digit of each image.
        labels: Add a `.cls` member to each sample.
    """
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(images), IMAGES_PER_SHARD)):
        with tarfile.open(folder / f"shard-{shard:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number_in_set, (pixels, digit) in enumerate(images[start : start + IMAGES_PER_SHARD], start=start):
                add_member(tar, f"{number_in_set:06}.png", encode_png(pixels))
                if labels:
                    add_member(tar, f"{number_in_set:06}.cls", str(digit).encode())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append one file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo-images`."""
    parser.add_argument("folder", type=Path, help="an empty or missing folder")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="which split is drawn")


def execute(options: Options) -> None:
    """Run the verb."""
    write_images(options.folder, options.seed)


COMMAND = Command(
    help="write the demo's images and stop",
    description="Write one split of the digits: class folders (labeled), Parquet (validation), tars (test,\n"
    "unlabeled).\n\n"
    "The test images are the same for every seed. All other sets are drawn anew, and all sets are disjoint.",
    examples=("digits --seed 7",),
    add_arguments=add_arguments,
    execute=execute,
)
