"""Draw small images and write them as files, tars and Parquet.

They have three classes that a tiny network can learn.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("red", "green", "blue")


def draw_png(label: int, seed: int, size: int = 8) -> bytes:
    """Return a PNG of noise in the colour of the label. Label -1 has no colour."""
    pixels = np.random.default_rng([seed, label + 1]).integers(0, 120, (size, size, 3), np.uint8)
    if label >= 0:
        pixels[..., label] += 110
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def draw_jpeg(number: int) -> bytes:
    """Return a JPEG of 52 x 40 pixels in one of three colours."""
    pixels = np.random.default_rng(number).integers(0, 120, (40, 52, 3), np.uint8)
    pixels[..., number % 3] += 110
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_photographs(folder: Path, shards: int, per_shard: int) -> list[str]:
    """Write labeled tars of JPEGs whose keys are numbers, and return the URIs."""
    for start in range(0, shards * per_shard, per_shard):
        numbers = range(start, start + per_shard)
        members = {
            f"{n:05}.{end}": data for n in numbers for end, data in (("jpg", draw_jpeg(n)), ("cls", b"%d" % (n % 3)))
        }
        write_tar(folder / f"{start:05}.tar", members)
    return [str(folder)]


def write_folders(root: Path, per_class: int, seed: int = 0) -> Path:
    """Write `<class>/<number>.png` for each class."""
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            path = root / name / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_png(label, seed + number))
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar of members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_pool(root: Path, shards: int, per_shard: int, seed: int = 1000) -> Path:
    """Write tars of unlabeled images. One in four has no class."""
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        members = {f"{number:05}.png": draw_png(number % 4 - 1, seed + number) for number in numbers}
        write_tar(root / f"pool-{shard:03}.tar", members)
    return root


def write_parquet(path: Path, per_class: int, seed: int) -> Path:
    """Write a Parquet file with columns `image` and `label` (the class name)."""
    images = [
        (draw_png(label, seed + number), name) for label, name in enumerate(CLASSES) for number in range(per_class)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [image for image, _ in images], "label": [name for _, name in images]}), path)
    return path


def write_labeled_tar(path: Path, per_class: int, seed: int) -> Path:
    """Write a WebDataset tar whose `.cls` members are class numbers."""
    members: dict[str, bytes] = {}
    for number in range(per_class * len(CLASSES)):
        label = number % len(CLASSES)
        members[f"{number:04}.png"] = draw_png(label, seed + number)
        members[f"{number:04}.cls"] = str(label).encode()
    return write_tar(path, members)


def write_run(root: Path, **changes: object) -> dict[str, object]:
    """Write all four sets under a folder, and return the content of a run file."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "data" / "classes.txt").write_text("\n".join(CLASSES))
    return {
        "name": "trial",
        "workdir": str(root / "work"),
        "labeled": [str(write_folders(root / "data" / "labeled", 4))],
        "validation": [str(write_parquet(root / "data" / "validation.parquet", 4, seed=100))],
        "test": [str(write_labeled_tar(root / "data" / "test" / "test.tar", 6, seed=200))],
        "unlabeled": [str(write_pool(root / "data" / "pool", 3, 40))],
        "classes": str(root / "data" / "classes.txt"),
        "images_per_class": 12,
        "classes_per_image": 2,
        "teacher_architecture": "resnet8_small",
        "student_architecture": "resnet8_small",
        "teacher_images_processed": 480,
        "pretrain_images_processed": 480,
        "finetune_epochs": 4,
        "batch_size": 12,
        "baseline_learning_rates": [0.5, 1.0],
        "finetune_learning_rates": [0.1, 0.2],
        "teacher_learning_rate": 1.0,
        "pretrain_learning_rate": 1.0,
        "resolution": 8,
        "augmentation": "shift-flip",
        "pods": 2,
        **changes,
    }
