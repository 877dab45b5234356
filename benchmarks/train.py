"""Compare the training with data in memory, torchvision's recipe and timm.

    make bench-train PHOTOS=folder-of-tars ARCHITECTURE=resnet50

All use one network, one machine, the same photographs, and one batch size: the 24 images that the paper's recipes let
a device process together. Photographs are drawn if no folder of tars is named. Each contestant is a fresh process
that warms up for some steps and then trains for the same time:

* ours: the stage's own data, loader and step, from tars of JPEGs.
* memory: the same step on one batch that is in memory. The ratio of the two is the cost of real data, and its target is
  0.9 at least.
* torchvision: the structure of its reference recipe (references/classification/train.py). It has ImageFolder, its
  transforms, a DataLoader with a worker for every core, SGD, and a loss that is read at every step.
* timm: the parts and the order of its train.py: create_dataset, create_loader, create_optimizer_v2, its step.
  Our target is to be no slower than the faster of the two.

The time includes reading, decoding, cropping and the step. Before the first turn, queued batches are discarded until
one has to be waited for. Batches in the queue at the end were paid for and are not counted. Our set is several
windows large, so that tars are read during the measurement, as those of a large set are. All files are in the
system's cache. On a CPU, decoding takes cores from the network. The benchmark measures and prints that share. The
default network is large, so that the share is small.

Contestants take turns of a second, so that the machine's load affects all alike (benchmarks/turns.py). Four trainings
are in memory at once.
"""

import argparse
import io
import itertools
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.train_contestants import CLASSES, CONTESTANTS
from benchmarks.turns import by_turns, wait_for_go
from semiscale.config.run_parameters import RECIPE_DEFAULT
from semiscale.stages.train.recipes import RECIPES

# A batch that took longer was not in the queue.
MAX_WAIT_FOR_QUEUED_BATCH_S = 0.01
# No contestant prefetches as many batches.
MAX_QUEUED_BATCHES = 64


def photographs(folder: Path) -> list[bytes]:
    """Read the JPEGs of a folder of tars."""
    files = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files += [file.read() for member in tar if member.isfile() and (file := tar.extractfile(member))]
    return [data for data in files if data[:2] == b"\xff\xd8"]


def draw_photographs(count: int) -> list[bytes]:
    """Draw JPEGs of 500 x 375 pixels that are as hard to decode as photographs."""
    import numpy as np
    from PIL import Image

    images = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(np.int16) + rng.normal(0, 12, (375, 500, 3)).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        images.append(buffer.getvalue())
    return images


def write_sets(folder: Path, images: list[bytes]) -> None:
    """Write the images as tars for our stage, and as class folders for the others.

    Args:
        folder: The folder of both sets.
        images: The JPEG files.
    """
    for number, data in enumerate(images):
        path = folder / "folders" / f"{number % CLASSES}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "tars").mkdir()
    for shard, start in enumerate(range(0, len(images), 100)):
        with tarfile.open(folder / "tars" / f"{shard:03}.tar", "w") as tar:
            for number in range(start, min(start + 100, len(images))):
                member = tarfile.TarInfo(f"{number:05}.jpg")
                member.size = len(images[number])
                tar.addfile(member, io.BytesIO(images[number]))


def run_contestant(options: argparse.Namespace) -> None:
    """Be one contestant: warm up, empty the queue, train, and log each step."""
    batches, step = CONTESTANTS[options.contestant](Path(options.folder), options)
    for _ in range(options.warm_up):
        step(next(batches))
    for _ in range(MAX_QUEUED_BATCHES):
        started = time.monotonic()
        next(batches)
        if time.monotonic() - started > MAX_WAIT_FOR_QUEUED_BATCH_S:
            break
    wait_for_go()
    for number in itertools.count(1):
        step(next(batches))
        print(number, flush=True)


def device_name() -> str:
    """Return the name of the device that runs the network."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measure_decoding_s(images: list[bytes], resolution: int) -> float:
    """Return the seconds of one core to decode and crop an image.

    Args:
        images: The JPEG files.
        resolution: The resolution of the crops, in pixels.
    """
    import numpy as np

    from semiscale.data.image_decoding import decode_image
    from semiscale.data.preprocessing import Preprocessing
    from semiscale.data.transforms import CROP_RANDOM_COUNT, random_resized_crop

    preprocessing = Preprocessing(resolution=resolution, augmentation="crop-flip")
    random = np.random.default_rng(0)
    started = time.process_time()
    for image in images[:200]:
        random_resized_crop(decode_image(image), preprocessing, random.random(CROP_RANDOM_COUNT))
    return (time.process_time() - started) / len(images[:200])


def is_installed(contestant: str) -> bool:
    """Return whether the packages of a contestant are installed."""
    try:
        version({"timm": "timm"}.get(contestant, "torch"))
    except PackageNotFoundError:
        return False
    return True


def measure(options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Let the contestants train.

    Returns:
        The images a second of each contestant, and the seconds of one core to decode an image.
    """
    with tempfile.TemporaryDirectory() as root:
        images = photographs(Path(options.photos)) if options.photos else draw_photographs(400)
        print(f"{len(images)} JPEGs of {sum(map(len, images)) / len(images) / 1000:.0f} kB", flush=True)
        write_sets(Path(root), images)
        this = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--folder", root, "--contestant"]
        printed = by_turns({name: [*this, name] for name in CONTESTANTS if is_installed(name)}, options.seconds)
    return {name: images_per_s(lines, options) for name, lines in printed.items()}, measure_decoding_s(
        images, options.resolution
    )


def images_per_s(lines: list[tuple[float, str]], options: argparse.Namespace) -> float:
    """Return the images a second between the ends of the first and the last step.

    Args:
        lines: A line for each step, after the seconds of the contestant's own turns.
        options: The arguments of the benchmark.

    Raises:
        SystemExit: There are less than two steps.
    """
    ended_s = [end_s for end_s, _ in lines]
    if len(ended_s) < 2:
        raise SystemExit(f"a step takes more than a third of {options.seconds:g} s: give more --seconds")
    return float(options.batch_size) * (len(ended_s) - 1) / (ended_s[-1] - ended_s[0])


def main() -> None:
    """Measure, and print the numbers as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="a folder of tars of JPEGs")
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument(
        "--device-batch-size", type=int, default=RECIPE_DEFAULT, help="of our training; -1 is the recipe's, 24"
    )
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the first turn")
    parser.add_argument("--seconds", type=float, default=150, help="training time of each contestant")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        run_contestant(options)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm") if is_installed(name))
    print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}")
    rates, decode_s = measure(options)
    is_recipe_default = options.device_batch_size == RECIPE_DEFAULT
    share = decode_s * rates["memory"] / (os.cpu_count() or 1)
    print(
        f"decoding: {decode_s * 1000:.2f} ms of a core an image, {share:.1%} of the {os.cpu_count()} cores at the rate "
        "of data in memory; without a GPU the network loses that much at least"
    )
    references = {name: rates["ours"] / rates[name] for name in rates if name not in ("ours", "memory")}
    print(
        json.dumps(
            {
                "architecture": options.architecture,
                "batch_size": options.batch_size,
                "device_batch_size": RECIPES["baseline"].device_batch_size
                if is_recipe_default
                else options.device_batch_size,
                "device": device_name(),
                "images_per_s": {name: round(rate, 2) for name, rate in rates.items()},
                "ratio_to_memory": round(rates["ours"] / rates["memory"], 3),
                "ratio_to_reference": round(min(references.values()), 3),
                **{f"ratio_to_{name}": round(ratio, 3) for name, ratio in references.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
