"""What a training starts from: fresh weights, the pre-training's, or weights from elsewhere."""

from itertools import zip_longest

import torch
from torch import nn

from semiscale.common.errors import InvalidInputError
from semiscale.models import checkpoint_io, checkpoint_metadata, networks, pretrained_weights
from semiscale.observability.progress import log_info
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.train.config import TrainConfig
from semiscale.storage.documents import load_document


def build_initial_model(config: TrainConfig, plan: PlanReceipt) -> tuple[nn.Module, str]:
    """Return the network that a training starts from, on the CPU, and where its weights came from, "" where fresh.

    Raises InvalidInputError where a recipe lacks what it starts from, and where weights are not the network's.
    """
    torch.manual_seed(config.seed)
    if config.start:
        return _model_from_receipt(config, plan)
    if config.resolved_recipe.starts_from_another and not config.start_weights:
        raise InvalidInputError(
            "SEMI-E240",
            f"train: recipe {config.recipe} needs --start, the receipt of the pre-training, or --start-weights.",
        )
    model = networks.build_model(config.architecture, len(plan.classes), config.resolution)
    if not config.start_weights:
        return model, ""
    read = pretrained_weights.read_state_dict(
        checkpoint_metadata.parse_checkpoint_ref(config.start_weights, "start_weights")
    )
    if pretrained_weights.load_except_head(model, config.architecture, read, config.resolution):
        log_info("train", f"{read.uri}: all but the head, which is new, for {len(plan.classes):,} classes")
    return model, read.source


def _model_from_receipt(config: TrainConfig, plan: PlanReceipt) -> tuple[nn.Module, str]:
    start = load_document(config.start, TrainReceipt)
    model, described = checkpoint_io.load_model(start.checkpoint)
    if described.architecture != config.architecture or described.classes != plan.classes:
        pairs = zip_longest(described.classes, plan.classes)
        other = next((f", the first other one {one!r} for {wanted!r}" for one, wanted in pairs if one != wanted), "")
        raise InvalidInputError(
            "SEMI-E244",
            f"{start.checkpoint}: The model is a {described.architecture} of {len(described.classes)} classes. The "
            f"plan needs {config.architecture} of {len(plan.classes)} classes{other}. For other classes give it as "
            "start_weights, which replaces the head.",
        )
    return model, start.checkpoint
