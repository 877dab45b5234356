"""Write the pool and the network of the scoring benchmark.

The pool is WebDataset tars of photographs. The network has random weights, which make it as fast as a trained one.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semiscale.data.preprocessing import Preprocessing
from semiscale.models import checkpoint_io, networks
from semiscale.models.checkpoint_metadata import CheckpointMetadata

PHOTOS = Path("../shared/data/photos")
CLASSES, CLASSES_PER_IMAGE = 1000, 10
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """A network at a resolution, the number of images, and the limiting part."""

    limit: str
    architecture: str
    resolution: int
    augmentation: str
    images: int

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing of the network's inputs."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation)


# On a CPU the model uses the cores that decode. Only a tiny model leaves decoding as the limit.
CASES_ON_CPU = [Case("model", "resnet50", 224, "crop-flip", 768), Case("decoder", "resnet8_small", 8, "shift", 25_600)]
CASES_ON_GPU = [
    Case("model", "resnet50", 224, "crop-flip", 25_600),
    Case("model", "resnext101_32x16d", 224, "crop-flip", 12_800),
    Case("decoder", "resnet18", 224, "crop-flip", 12_800),
]


def cases() -> list[Case]:
    """Return the cases that are measured on this machine."""
    return CASES_ON_GPU if torch.cuda.is_available() else CASES_ON_CPU


def photographs(folder: Path) -> list[bytes]:
    """Return the JPEG files of a folder's tars.

    If the folder has no tars, return crops of scikit-learn's two photographs.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        return list(draw_crops(400))
    return [data for path in tars for data in jpeg_members(path)]


def jpeg_members(path: Path) -> Iterator[bytes]:
    """Yield the JPEG files of a tar."""
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and member.name.lower().endswith((".jpg", ".jpeg")):
                yield file.read()


def draw_crops(count: int) -> Iterator[bytes]:
    """Yield JPEG files of random crops (500 x 375) of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for photograph in islice(cycle(load_sample_images().images), count):
        top, left = rng.integers(photograph.shape[0] - 375), rng.integers(photograph.shape[1] - 500)
        buffer = io.BytesIO()
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(buffer, "JPEG", quality=95)
        yield buffer.getvalue()


class Workload:
    """One case with its pool and its network in a folder."""

    def __init__(self, case: Case, photos: list[bytes], folder: Path) -> None:
        self.case, self.photos, self.folder = case, photos, folder

    def write(self) -> None:
        """Write the pool and the network.

        The pool has whole batches only, so no contestant scores a partial batch.
        """
        pool = self.folder / "pool"
        pool.mkdir(parents=True)
        images = islice(cycle(self.photos), self.case.images)
        while batch := list(islice(images, 256)):
            with tarfile.open(pool / f"{len(list(pool.iterdir())):06}.tar", "w") as tar:
                for number, data in enumerate(batch):
                    member = tarfile.TarInfo(f"{number:06}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        torch.manual_seed(0)
        metadata = CheckpointMetadata(
            architecture=self.case.architecture,
            classes=[str(number) for number in range(CLASSES)],
            preprocessing=self.case.preprocessing,
            recipe="teacher",
            digest="0",
        )
        checkpoint = checkpoint_io.save_model(
            networks.build_model(self.case.architecture, CLASSES), metadata, str(self.folder)
        )
        (self.folder / "checkpoint").write_text(checkpoint)

    @property
    def tars(self) -> list[str]:
        """Return the paths of the tars."""
        return [str(path) for path in sorted((self.folder / "pool").iterdir())]

    @property
    def checkpoint(self) -> str:
        """Return the path of the network."""
        return (self.folder / "checkpoint").read_text()
