"""Run the pipeline on ten classes of small photographs over fresh seeds.

    make study DATA=folder

It measures whether a pool with distractors adds to a few labels. The folder holds `labeled-*.tar` and `test-*.tar`
(WebDataset, .cls), `unlabeled-*.tar`, `validation.parquet` (image bytes and class names) and `classes.txt`. Every
seed draws the same number of labeled images of each class, and its own initial weights. Pool, validation and test
images are the same for all seeds. Only the table uses the test images. Each run chooses its learning rates on
validation. The other settings were chosen on the validation images, with seed 100.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.gains import compare
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.data import listing, reader
from semiscale.data.shard import SampleFields

FOLDER = Path("runs/study")
SETTINGS = {
    "images_per_class": 1500,
    "classes_per_image": 1,
    "pods": 1,
    "teacher_architecture": "resnet8x2_small",
    "student_architecture": "resnet8_small",
    "resolution": 16,
    "augmentation": "shift-flip",
    "batch_size": 64,
    "device_batch_size": 64,
    "weight_decay": 0.001,
    "teacher_images_processed": 100_000,
    "pretrain_images_processed": 150_000,
    "finetune_epochs": 10,
    "teacher_learning_rate": 0.8,
    "pretrain_learning_rate": 0.4,
    "baseline_learning_rates": [0.2, 0.4, 0.8],
    "finetune_learning_rates": [0.002, 0.02],
}


def main() -> None:
    """Run the seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the images")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on")
    parser.add_argument("--labels", type=int, default=100, help="labeled images a class")
    arguments = parser.parse_args()
    compare(partial(settings_of, arguments.data, arguments.labels), range(1, arguments.seeds + 1), at_a_time=1)


def settings_of(data: Path, labels: int, seed: int) -> RunConfig:
    """Return the run file of one seed, and draw its labeled images.

    Args:
        data: The folder of the images.
        labels: The number of labeled images of each class.
        seed: The seed.
    """
    labeled = FOLDER / f"labeled-{labels}-{seed}"
    if not labeled.exists():
        draw_labeled(data, labels, labeled, seed)
    content = {
        **SETTINGS,
        "name": f"labels-{labels}-seed-{seed}",
        "seed": seed,
        "workdir": str(FOLDER),
        "labeled": str(labeled),
        "unlabeled": [str(path) for path in sorted(data.glob("unlabeled-*.tar"))],
        "validation": str(data / "validation.parquet"),
        "test": [str(path) for path in sorted(data.glob("test-*.tar"))],
        "classes": str(data / "classes.txt"),
    }
    return run_config.validate_run_config(content, where=f"seed {seed}").with_absolute_uris()


def draw_labeled(data: Path, labels: int, folder: Path, seed: int) -> None:
    """Draw labeled images and write them into class folders.

    Args:
        data: The folder of the images.
        labels: The number of labeled images of each class.
        folder: The folder of the class folders.
        seed: The seed.
    """
    classes = (data / "classes.txt").read_text().split()
    shards = listing.list_shards([str(path.resolve()) for path in sorted(data.glob("labeled-*.tar"))])
    samples = [sample for shard in shards for sample in reader.iter_samples(shard, SampleFields("image", "label"))]
    rng = np.random.default_rng([seed, 4])
    for number, name in enumerate(classes):
        of_class = [sample for sample in samples if sample.label == str(number)]
        (folder / name).mkdir(parents=True)
        for index in rng.permutation(len(of_class))[:labels]:
            (folder / name / f"{index:05}.jpg").write_bytes(of_class[index].image)


if __name__ == "__main__":
    main()
