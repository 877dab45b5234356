"""The transfer setting *fc-only* (section 5.2): a network stays as it is, and gets a logistic regression for its head.

The paper "extracts features from the final fc layer", which may be read as what enters that layer or what leaves it.
Here it is what enters: 2,048 numbers of a ResNet-50. Then the regression takes the layer's place, as the name *fc-only*
says, and what comes of it is an ordinary checkpoint of the same architecture. A regression on what leaves the layer,
the logits of the old classes, is one of these with fewer freedoms: two linear layers in a row are one.
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
    """Fit a head, save the network with it in `folder`, and return the fields of the receipt.

    Each image is forwarded once, cut as models are measured; batch normalisation goes by its running statistics.
    Memory: the features, 8 kB an image for a ResNet-50 (CUB2011 50 MB, ImageNet 10 GB), twice for a moment, a head for
    each L2, and what PreparedSplit holds. One device works. A process that is killed leaves nothing to go on from: the
    next one forwards the images again.
    """
    checkpoint_io.configure_torch()
    plan = load_document(config.plan, PlanReceipt)
    read = pretrained_weights.read_state_dict(parse_checkpoint_ref(config.start_weights, "start_weights"))
    model = networks.build_model(config.architecture, len(plan.classes), config.resolution)
    layer = networks.linear_head_name(model, config.architecture, config.resolution)
    pretrained_weights.load_except_head(model, config.architecture, read, config.resolution)
    head = model.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    model.set_submodule(layer, nn.Identity())  # its logits are now what enters the head
    started = time.monotonic()
    train, validation = _features(config, model, [plan.train, plan.validation])
    seconds = time.monotonic() - started
    on, biased = checkpoint_io.default_device(), head.bias is not None
    best, fitted = select_by_validation(
        logistic_regression.regularization_path(*train, len(plan.classes), biased, on), *validation
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
        "fitted": fitted,
        "validation_top1": next(one.validation_top1 for one in fitted if one.l2 == best.l2),
        "curve": [],
        "images_per_s": (plan.train.samples + plan.validation.samples) / seconds,
    }


def select_by_validation(
    path: Iterable[RegularizedFit], features_BF: Tensor, labels_B: Tensor
) -> tuple[RegularizedFit, list[RegularizationTrial]]:
    """Return the best solution and what was measured of all: by validation top-1; of equals, by the lower loss."""
    solutions, fitted = [], []
    for solution in path:
        logits_BC = solution.head.logits(features_BF).cpu()
        solutions.append(solution)
        fitted.append(
            RegularizationTrial(
                l2=solution.l2,
                validation_top1=float(topk_correct(logits_BC.topk(1).indices, labels_B, 1).double().mean()),
                validation_loss=float(F.cross_entropy(logits_BC, labels_B)),
                steps=solution.steps,
                gradient=solution.gradient,
            )
        )
    best = min(fitted, key=lambda one: (-one.validation_top1, one.validation_loss))
    end = ", at an end of what was tried" if best in (fitted[0], fitted[-1]) else ""
    log_info(
        "train",
        f"{RECIPE_NAME}: validation top-1 {best.validation_top1:.4f} at L2 {best.l2:.1e}, of {len(fitted)}{end}",
    )
    return solutions[fitted.index(best)], fitted


def _features(config: LinearProbeConfig, model: nn.Module, splits: list[LabeledSplit]) -> list[tuple[Tensor, Tensor]]:
    """Return features_BF and labels_B of each split."""
    columns = SampleFields(config.image_column, config.label_column)
    progress = Progress("train", sum(split.samples for split in splits))
    model, found = model.to(checkpoint_io.default_device()), []
    for split in splits:
        prepared = EvalLoader(split, columns, config.preprocessing)
        features_BF = predict_logits(model, prepared, checkpoint_io.default_device(), progress.update)
        if not bool(features_BF.isfinite().all()):
            raise SemiscaleError(
                "SEMI-E245",
                f"{config.start_weights}: The features of the network are not finite. Check that the file is complete.",
            )
        found.append((features_BF, prepared.labels_B))
    return found


@torch.no_grad()
def _copy_weights(fitted: LinearHead, head: nn.Linear) -> nn.Linear:
    """Put a fitted head's weights into a layer, in the layer's precision."""
    head.weight.copy_(fitted.weight_CF)
    if head.bias is not None:
        head.bias.copy_(fitted.bias_C)
    return head
