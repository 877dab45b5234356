"""Training against what it could be, and against what a user would otherwise run.

    make bench-train PHOTOS=folder-of-tars ARCHITECTURE=resnet50

One network, one batch size, one machine, the same photographs (drawn ones where no folder of tars is named). Each
contestant is a fresh process that trains for some steps after some to warm up, and reports its images a second:

* ours: the stage's own data, feed and step, from tars of JPEGs;
* memory: the same step on one batch that is in memory already; what real data cost is the ratio of the two;
* torchvision: the structure of its reference recipe (references/classification/train.py): ImageFolder, its transforms,
  a DataLoader with a worker for every core, SGD, a loss that is read at every step as its metric logger does;
* timm: the parts and the order of its train.py: create_dataset, create_loader, create_optimizer_v2, its step.

The rounds alternate, so that what else this machine does hits all alike; each ratio is of the medians.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONTESTANTS = ("ours", "memory", "torchvision", "timm")
CLASSES = 10


def photographs(folder: Path) -> list[bytes]:
    """Read the JPEGs of a folder of tars."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [file.read() for member in tar if member.isfile() and (file := tar.extractfile(member))]
    return [data for data in found if data[:2] == b"\xff\xd8"]


def drawn(count: int) -> list[bytes]:
    """Draw photograph-like JPEGs of 500 x 375 pixels, where there are no photographs."""
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
    """Write the images as tars for us, and as class folders for the others."""
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


def ours(folder: Path, options: argparse.Namespace) -> Callable[[], float]:
    """The stage's own training loop, without its checkpoints and validations."""
    import numpy as np

    from components.shared import shards as sharding
    from components.shared.receipts import Preprocessing
    from components.shared.shards import Columns
    from components.shared.splits import LabeledShard
    from components.train.data import TrainingData
    from components.train.feed import on_device
    from components.train.ranks import Ranks

    listed = sharding.find([str(folder / "tars")])
    shards = [
        LabeledShard(shard, (100 * number + np.arange(samples, dtype=np.int32)) % CLASSES)
        for number, shard in enumerate(listed)
        for samples in [len(list(sharding.read(shard, Columns())))]
    ]
    preprocessing = Preprocessing(resolution=options.resolution, augmentation="crop-flip")
    data = TrainingData(shards, Columns(), preprocessing, 0, Ranks())
    training = bench_training(options)
    batches = on_device(data.batches(options.batch_size, 10**6), training._device)
    steps = itertools.count(1)
    return lambda: training._step(next(batches), 0.01, next(steps)).item()


def memory(folder: Path, options: argparse.Namespace) -> Callable[[], float]:
    """The same step on a batch that is there already."""
    import torch

    from components.train.feed import DeviceBatch

    training = bench_training(options)
    shape = (options.batch_size, options.resolution, options.resolution, 3)
    images_BHWC = torch.randint(0, 255, shape, dtype=torch.uint8, device=training._device)
    labels_B = (torch.arange(options.batch_size) % CLASSES).to(training._device)
    batch = DeviceBatch(images_BHWC, labels_B, [])
    steps = itertools.count(1)
    return lambda: training._step(batch, 0.01, next(steps)).item()


def bench_training(options: argparse.Namespace) -> Any:
    """Our training of one network, ready to step."""
    import torch

    from components.shared import models
    from components.train.config import TrainConfig
    from components.train.loop import Training
    from components.train.ranks import Ranks

    models.use_threads()
    torch.manual_seed(0)
    config = TrainConfig(
        workdir="", recipe="baseline", architecture=options.architecture, plan="", learning_rate=0.01,
        batch_size=options.batch_size, device_batch_size=options.batch_size, resolution=options.resolution,
        augmentation="crop-flip",
    )  # fmt: skip
    model = models.build(options.architecture, CLASSES).to(models.device())
    training = Training(config, model, None, 10**9, Ranks())
    training._optimizer = training._sgd()
    training._network = training._distributed(0)
    model.train()
    return training


def torchvision(folder: Path, options: argparse.Namespace) -> Callable[[], float]:
    """torchvision's references/classification/train.py, its presets and its train_one_epoch, on one process."""
    import torch
    from torchvision import datasets, models, transforms

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.resolution, antialias=True),
            transforms.RandomHorizontalFlip(0.5),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    dataset = datasets.ImageFolder(str(folder / "folders"), transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=options.batch_size, shuffle=True, num_workers=os.cpu_count() or 1,
        pin_memory=device.type == "cuda", drop_last=True, persistent_workers=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(models, options.architecture)(num_classes=CLASSES).to(device)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    batches = forever(loader)

    def step() -> float:
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def timm(folder: Path, options: argparse.Namespace) -> Callable[[], float]:
    """timm's train.py: its dataset, loader, optimizer and step, with its defaults but for the recipe's."""
    import torch
    from timm import create_model
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = create_dataset("", root=str(folder / "folders"), is_training=True, batch_size=options.batch_size)
    loader = create_loader(
        dataset, input_size=(3, options.resolution, options.resolution), batch_size=options.batch_size,
        is_training=True, use_prefetcher=device.type == "cuda", num_workers=os.cpu_count() or 1,
        interpolation="bilinear", color_jitter=0.0, device=device, persistent_workers=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = create_model(options.architecture, num_classes=CLASSES).to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    batches = forever(loader)
    model.train()

    def step() -> float:
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def forever(loader: Any) -> Iterator[Any]:
    """Go through a loader again and again."""
    while True:
        yield from loader


def contest(options: argparse.Namespace) -> None:
    """Be one contestant: warm up, train, print images a second."""
    step = globals()[options.contestant](Path(options.folder), options)
    for _ in range(options.warm_up):
        step()
    started = time.monotonic()
    for _ in range(options.steps):
        step()
    print(options.steps * options.batch_size / (time.monotonic() - started))
    sys.stdout.flush()
    os._exit(0)  # the loaders' threads and processes are of no more use


def installed(contestant: str) -> bool:
    """Say whether a contestant can take part."""
    try:
        version({"timm": "timm"}.get(contestant, "torch"))
    except PackageNotFoundError:
        return False
    return True


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Run the rounds; images a second of each contestant in each."""
    contestants = [name for name in CONTESTANTS if installed(name)]
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as root:
        images = photographs(Path(options.photos)) if options.photos else drawn(200)
        print(f"{len(images)} JPEGs of {sum(map(len, images)) / len(images) / 1000:.0f} kB")
        write_sets(Path(root), images)
        for number in range(options.rounds):
            for name in contestants if number % 2 == 0 else reversed(contestants):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.train",
                    *sys.argv[1:],
                    "--contestant",
                    name,
                    "--folder",
                    root,
                ]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rates[name].append(float(done.stdout.split()[-1]))
                print(f"round {number + 1}: {name} {rates[name][-1]:.2f} images/s", flush=True)
    return rates


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="a folder of tars of JPEGs")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm") if installed(name))
    print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}")
    rates = measure(options)
    median = {name: statistics.median(found) for name, found in rates.items()}
    references = {name: median["ours"] / median[name] for name in median if name not in ("ours", "memory")}
    print(
        json.dumps(
            {
                "architecture": options.architecture,
                "batch_size": options.batch_size,
                "images_per_s": {name: round(rate, 2) for name, rate in median.items()},
                "ratio_to_memory": round(median["ours"] / median["memory"], 3),
                "ratio_to_reference": round(min(references.values()), 3),
                **{f"ratio_to_{name}": round(ratio, 3) for name, ratio in references.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
