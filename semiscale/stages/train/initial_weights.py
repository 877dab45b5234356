"""The weights that a training starts from: fresh ones, those of the pre-training, or a file's."""

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
    """Build the network of a training with its initial weights.

    Args:
        config: The training.
        plan: The plan, which has the classes.

    Returns:
        The network on the CPU, and the source of its weights, which is "" for fresh ones.

    Raises:
        InvalidInputError: The recipe needs a model to start from and none is given, or the weights do not fit.
    """
    torch.manual_seed(config.seed)
    if config.start:
        return _model_from_receipt(config, plan)
    if config.resolved_recipe.starts_from_another and not config.start_weights:
        raise InvalidInputError(
            "SEMI-E240",
            f"train: The recipe {config.recipe} needs a model to start from. Give the receipt of the pre-training as "
            "--start, or weights as --start-weights.",
        )
    model = networks.build_model(config.architecture, len(plan.classes), config.resolution)
    if not config.start_weights:
        return model, ""
    weights = pretrained_weights.read_state_dict(
        checkpoint_metadata.parse_checkpoint_ref(config.start_weights, "start_weights")
    )
    if pretrained_weights.load_except_head(model, config.architecture, weights, config.resolution):
        log_info("train", f"{weights.uri}: all but the head, which is new, for {len(plan.classes):,} classes")
    return model, weights.source


def _model_from_receipt(config: TrainConfig, plan: PlanReceipt) -> tuple[nn.Module, str]:
    """Load the model of the receipt `start`, which must have the run's architecture and classes."""
    start = load_document(config.start, TrainReceipt)
    model, described = checkpoint_io.load_model(start.checkpoint)
    if described.architecture != config.architecture or described.classes != plan.classes:
        pairs = zip_longest(described.classes, plan.classes)
        difference = next(
            (f". The first difference is {actual!r} for {wanted!r}" for actual, wanted in pairs if actual != wanted), ""
        )
        raise InvalidInputError(
            "SEMI-E244",
            f"{start.checkpoint}: The model is a {described.architecture} of {len(described.classes)} classes. The "
            f"plan needs {config.architecture} of {len(plan.classes)} classes{difference}. For other classes give the "
            "model as start_weights, which replaces the head.",
        )
    return model, start.checkpoint
