"""What a training starts from: fresh weights, the pre-training's, or weights from elsewhere."""

from itertools import zip_longest

import torch
from torch import nn

from components.shared import checkpoints, models, weights
from components.shared.errors import Refused
from components.shared.progress import say
from components.shared.receipts import PlanReceipt, TrainReceipt, load
from components.train.config import TrainConfig


def starting_model(config: TrainConfig, plan: PlanReceipt) -> tuple[nn.Module, str]:
    """Return the network that a training starts from, on the CPU, and where its weights came from, "" where fresh.

    Raises Refused where a recipe lacks what it starts from, and where weights are not the network's.
    """
    torch.manual_seed(config.seed)
    if config.start:
        return _of_receipt(config, plan)
    if config.numbers.starts_from_another and not config.start_weights:
        raise Refused(
            f"train: recipe {config.recipe} needs --start, the receipt of the pre-training, or --start-weights"
        )
    model = models.build(config.architecture, len(plan.classes), config.resolution)
    if not config.start_weights:
        return model, ""
    read = weights.read(checkpoints.pinned(config.start_weights, "start_weights"))
    if weights.transfer(model, config.architecture, read, config.resolution):
        say("train", f"{read.uri}: all but the head, which is new, for {len(plan.classes):,} classes")
    return model, read.source


def _of_receipt(config: TrainConfig, plan: PlanReceipt) -> tuple[nn.Module, str]:
    start = load(config.start, TrainReceipt)
    model, described = models.read(start.checkpoint)
    if described.architecture != config.architecture or described.classes != plan.classes:
        pairs = zip_longest(described.classes, plan.classes)
        other = next((f", the first other one {one!r} for {wanted!r}" for one, wanted in pairs if one != wanted), "")
        raise Refused(
            f"{start.checkpoint}: a {described.architecture} of {len(described.classes)} classes; "
            f"expected {config.architecture} of the plan's {len(plan.classes)}{other}; for other classes give it as "
            "--start-weights, which takes all but its head"
        )
    return model, start.checkpoint
