"""Fit a linear probe: the transfer setting *fc-only* of section 5.2.

The network is frozen, and its head is replaced by a logistic regression.

The paper "extracts features from the final fc layer". This may mean the input of that layer or its output. Here it is
the input, 2,048 numbers of a ResNet-50. The regression can then take the layer's place, as the name *fc-only* says. The
result is an ordinary checkpoint of the same architecture. A regression on the output, the logits of the old classes,
would be a special case. Two linear layers in a row are one linear layer.
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiscale.common.errors import SemiscaleError
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.evaluation.metrics import topk_correct
from semiscale.models import checkpoint_io, networks, pretrained_weights
from semiscale.models.checkpoint_metadata import CheckpointMetadata, parse_checkpoint_ref
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import RegularizationTrial
from semiscale.stages.train import logistic_regression
from semiscale.stages.train.config import LinearProbeConfig
from semiscale.stages.train.logistic_regression import LinearHead, RegularizedFit
from semiscale.storage.documents import load_document

RECIPE_NAME = "fc-only"


def fit(config: LinearProbeConfig, folder: str) -> dict[str, object]:
    """Fit a head, and save the network with it in `folder`.

    Each image is forwarded once, with the center crop of evaluation. Batch normalization uses its running statistics.
    One device works. A killed process leaves nothing to resume from, so the next one forwards the images again.

    Args:
        config: The linear probe.
        folder: URI of its folder.

    Returns:
        The fields of the receipt.

    Raises:
        SemiscaleError: The features of the network are not finite.

    Cost:
        Memory for the features and, for a moment, a copy of them. They are 8 kB an image for a ResNet-50, which is 50
        MB for CUB2011 and 10 GB for ImageNet. The heads of all strengths and an EvalLoader come on top.
    """
    checkpoint_io.configure_torch()
    plan = load_document(config.plan, PlanReceipt)
    read = pretrained_weights.read_state_dict(parse_checkpoint_ref(config.start_weights, "start_weights"))
    model = networks.build_model(config.architecture, len(plan.classes), config.resolution)
    layer = networks.linear_head_name(model, config.architecture, config.resolution)
    pretrained_weights.load_except_head(model, config.architecture, read, config.resolution)
    head = model.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    # The logits of the network are now the input of its head.
    model.set_submodule(layer, nn.Identity())
    started = time.monotonic()
    train, validation = _compute_features(config, model, [plan.train, plan.validation])
    seconds = time.monotonic() - started
    device, has_bias = checkpoint_io.default_device(), head.bias is not None
    best, trials = select_by_validation(
        logistic_regression.regularization_path(*train, len(plan.classes), has_bias, device), *validation
    )
    model.set_submodule(layer, _copy_weights(best.head, head))
    description = CheckpointMetadata(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=config.preprocessing,
        recipe=RECIPE_NAME,
        digest=config.digest(),
    )
    return {
        "recipe": RECIPE_NAME,
        "architecture": config.architecture,
        "checkpoint": checkpoint_io.save_model(model, description, folder),
        "source": read.source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": plan.classes,
        "preprocessing": config.preprocessing,
        "images_processed": 0,
        "samples": plan.train.samples,
        "learning_rate": 0.0,
        "l2": best.l2,
        "fitted": trials,
        "validation_top1": next(trial.validation_top1 for trial in trials if trial.l2 == best.l2),
        "curve": [],
        "images_per_s": (plan.train.samples + plan.validation.samples) / seconds,
    }


def select_by_validation(
    path: Iterable[RegularizedFit], features_BF: Tensor, labels_B: Tensor
) -> tuple[RegularizedFit, list[RegularizationTrial]]:
    """Return the best solution by validation top-1, and the measurements of all.

    If several have the same top-1, the one with the lowest validation loss is the best.

    Args:
        path: The solutions, one for each strength of L2.
        features_BF: Features of the validation images.
        labels_B: Their classes.
    """
    solutions, trials = [], []
    for solution in path:
        logits_BC = solution.head.logits(features_BF).cpu()
        solutions.append(solution)
        trials.append(
            RegularizationTrial(
                l2=solution.l2,
                validation_top1=float(topk_correct(logits_BC.topk(1).indices, labels_B, 1).double().mean()),
                validation_loss=float(F.cross_entropy(logits_BC, labels_B)),
                steps=solution.steps,
                gradient=solution.gradient,
            )
        )
    best = min(trials, key=lambda trial: (-trial.validation_top1, trial.validation_loss))
    end = ", at an end of what was tried" if best in (trials[0], trials[-1]) else ""
    log_info(
        "train",
        f"{RECIPE_NAME}: validation top-1 {best.validation_top1:.4f} at L2 {best.l2:.1e}, of {len(trials)}{end}",
    )
    return solutions[trials.index(best)], trials


def _compute_features(
    config: LinearProbeConfig, model: nn.Module, splits: list[LabeledSplit]
) -> list[tuple[Tensor, Tensor]]:
    """Return features_BF and labels_B of each split."""
    columns = SampleFields(config.image_column, config.label_column)
    progress = Progress("train", sum(split.samples for split in splits))
    model = model.to(checkpoint_io.default_device())
    features = []
    for split in splits:
        loader = EvalLoader(split, columns, config.preprocessing)
        features_BF = predict_logits(model, loader, checkpoint_io.default_device(), progress.update)
        if not bool(features_BF.isfinite().all()):
            raise SemiscaleError(
                "SEMI-E245",
                f"{config.start_weights}: The features of the network are not finite. Check that the file is complete.",
            )
        features.append((features_BF, loader.labels_B))
    return features


@torch.no_grad()
def _copy_weights(head: LinearHead, layer: nn.Linear) -> nn.Linear:
    """Copy the weights of a head into a layer, in the layer's precision."""
    layer.weight.copy_(head.weight_CF)
    if layer.bias is not None:
        layer.bias.copy_(head.bias_C)
    return layer
