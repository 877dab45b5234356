"""Prepare the contestants of the training benchmark.

Each function returns the batches of a contestant and a step on a batch. benchmarks/train.py has the rules. Imports
stand in the functions, so that a contestant's process loads only its own libraries.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CLASSES = 10
# Our set is as large as this number of shuffle windows.
WINDOWS = 4
# The batches of a contestant, and a step on a batch, which returns the loss.
Contestant = tuple[Iterator[Any], Callable[[Any], float]]


def ours(folder: Path, options: argparse.Namespace) -> Contestant:
    """Prepare our training step and loader, without checkpoints and validations.

    Args:
        folder: The folder of both sets.
        options: The arguments of the benchmark.
    """
    import numpy as np

    from semiscale.data import listing, reader
    from semiscale.data.labeled import LabeledShard
    from semiscale.data.preprocessing import Preprocessing
    from semiscale.data.shard import SampleFields
    from semiscale.stages.train.distributed import DistributedContext
    from semiscale.stages.train.input_pipeline import dataset as training_data
    from semiscale.stages.train.input_pipeline.device_loader import device_batches

    listed = listing.list_shards([str(folder / "tars")])
    shards = [
        LabeledShard(shard, (100 * number + np.arange(samples, dtype=np.int32)) % CLASSES)
        for number, shard in enumerate(listed)
        for samples in [len(list(reader.iter_samples(shard, SampleFields())))]
    ]
    vars(training_data)["SHUFFLE_BUFFER_BYTES"] = sum(shard.size_bytes for shard in listed) // WINDOWS
    preprocessing = Preprocessing(resolution=options.resolution, augmentation="crop-flip")
    data = training_data.TrainDataset(shards, SampleFields(), preprocessing, 0, DistributedContext())
    training = build_train_step(options)
    batches = device_batches(data, options.batch_size, 10**6, 0, training._device)
    steps = itertools.count(1)
    return batches, lambda batch: training.all_reduce_step(batch, 0.01, next(steps)).item()


def memory(folder: Path, options: argparse.Namespace) -> Contestant:
    """Prepare the same step on one batch in memory.

    Args:
        folder: The folder of both sets, which is not read.
        options: The arguments of the benchmark.
    """
    import torch

    from semiscale.stages.train.input_pipeline.device_loader import DeviceBatch

    training = build_train_step(options)
    shape = (options.batch_size, options.resolution, options.resolution, 3)
    images_BHWC = torch.randint(0, 255, shape, dtype=torch.uint8, device=training._device)
    labels_B = (torch.arange(options.batch_size) % CLASSES).to(training._device)
    batch = DeviceBatch(images_BHWC, labels_B, [])
    steps = itertools.count(1)
    return itertools.repeat(batch), lambda batch: training.all_reduce_step(batch, 0.01, next(steps)).item()


def build_train_step(options: argparse.Namespace) -> Any:
    """Build our training step of one network."""
    import torch

    from semiscale.models import checkpoint_io, networks
    from semiscale.stages.train.config import TrainConfig
    from semiscale.stages.train.distributed import DistributedContext
    from semiscale.stages.train.train_state import TrainState
    from semiscale.stages.train.train_step import TrainStep

    checkpoint_io.configure_torch()
    torch.manual_seed(0)
    config = TrainConfig(
        workdir="", recipe="baseline", architecture=options.architecture, plan="", learning_rate=0.01,
        batch_size=options.batch_size, device_batch_size=options.device_batch_size, resolution=options.resolution,
        augmentation="crop-flip",
    )  # fmt: skip
    device = checkpoint_io.default_device()
    model = networks.build_model(options.architecture, CLASSES).to(device)
    steps = 10**9 // options.batch_size
    training = TrainStep(config, TrainState(config, model, steps), steps, 0, device, DistributedContext())
    model.train()
    return training


def torchvision(folder: Path, options: argparse.Namespace) -> Contestant:
    """Prepare the presets and train_one_epoch of torchvision's reference.

    Args:
        folder: The folder of both sets.
        options: The arguments of the benchmark.
    """
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return iterate_forever(loader), build_plain_step(model, optimizer, device)


def timm(folder: Path, options: argparse.Namespace) -> Contestant:
    """Prepare the dataset, loader, optimizer and step of timm's train.py.

    All settings that the recipe does not give have timm's defaults.

    Args:
        folder: The folder of both sets.
        options: The arguments of the benchmark.
    """
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
    model.train()
    return iterate_forever(loader), build_plain_step(model, optimizer, device)


def build_plain_step(model: Any, optimizer: Any, device: Any) -> Callable[[Any], float]:
    """Return the usual step of PyTorch: cross-entropy, in bfloat16 on a GPU."""
    import torch

    criterion = torch.nn.CrossEntropyLoss()

    def step(batch: Any) -> float:
        images, labels = (tensor.to(device) for tensor in batch)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def iterate_forever(loader: Any) -> Iterator[Any]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


CONTESTANTS = {"ours": ours, "memory": memory, "torchvision": torchvision, "timm": timm}
