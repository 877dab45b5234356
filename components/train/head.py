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

from components.shared import models, networks, weights
from components.shared.checkpoints import Description, pinned
from components.shared.errors import SemiscaleError
from components.shared.predict import PreparedSplit, hits, logits
from components.shared.progress import Progress, say
from components.shared.receipts import Fitted, PlanReceipt, Split, load
from components.shared.shards import Columns
from components.train import logistic
from components.train.config import HeadConfig
from components.train.logistic import Head, Solution

RECIPE = "fc-only"


def run(config: HeadConfig, folder: str) -> dict[str, object]:
    """Fit a head, save the network with it in `folder`, and return the fields of the receipt.

    Each image is forwarded once, cut as models are measured; batch normalisation goes by its running statistics.
    Memory: the features, 8 kB an image for a ResNet-50 (CUB2011 50 MB, ImageNet 10 GB), twice for a moment, a head for
    each L2, and what PreparedSplit holds. One device works. A process that is killed leaves nothing to go on from: the
    next one forwards the images again.
    """
    models.set_up()
    plan = load(config.plan, PlanReceipt)
    read = weights.read(pinned(config.start_weights, "start_weights"))
    model = models.build(config.architecture, len(plan.classes), config.resolution)
    layer = networks.linear_head(model, config.architecture, config.resolution)
    weights.transfer(model, config.architecture, read, config.resolution)
    head = model.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    model.set_submodule(layer, nn.Identity())  # its logits are now what enters the head
    started = time.monotonic()
    train, validation = _features(config, model, [plan.train, plan.validation])
    seconds = time.monotonic() - started
    on, biased = models.device(), head.bias is not None
    best, fitted = choose(logistic.path(*train, len(plan.classes), biased, on), *validation)
    model.set_submodule(layer, _put(best.head, head))
    description = Description(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=config.preprocessing,
        recipe=RECIPE,
        digest=config.digest(),
    )
    return {
        "recipe": RECIPE,
        "architecture": config.architecture,
        "checkpoint": models.save(model, description, folder),
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


def choose(path: Iterable[Solution], features_BF: Tensor, labels_B: Tensor) -> tuple[Solution, list[Fitted]]:
    """Return the best solution and what was measured of all: by validation top-1; of equals, by the lower loss."""
    solutions, fitted = [], []
    for solution in path:
        logits_BC = solution.head.logits(features_BF).cpu()
        solutions.append(solution)
        fitted.append(
            Fitted(
                l2=solution.l2,
                validation_top1=float(hits(logits_BC, labels_B, 1).double().mean()),
                validation_loss=float(F.cross_entropy(logits_BC, labels_B)),
                steps=solution.steps,
                gradient=solution.gradient,
            )
        )
    best = min(fitted, key=lambda one: (-one.validation_top1, one.validation_loss))
    end = ", at an end of what was tried" if best in (fitted[0], fitted[-1]) else ""
    say("train", f"{RECIPE}: validation top-1 {best.validation_top1:.4f} at L2 {best.l2:.1e}, of {len(fitted)}{end}")
    return solutions[fitted.index(best)], fitted


def _features(config: HeadConfig, model: nn.Module, splits: list[Split]) -> list[tuple[Tensor, Tensor]]:
    """Return features_BF and labels_B of each split."""
    columns = Columns(config.image_column, config.label_column)
    progress = Progress("train", sum(split.samples for split in splits))
    model, found = model.to(models.device()), []
    for split in splits:
        prepared = PreparedSplit(split, columns, config.preprocessing)
        features_BF = logits(model, prepared, models.device(), progress.add)
        if not bool(features_BF.isfinite().all()):
            raise SemiscaleError(f"train: {config.start_weights}: features are not finite; are its weights whole?")
        found.append((features_BF, prepared.labels_B))
    return found


@torch.no_grad()
def _put(fitted: Head, head: nn.Linear) -> nn.Linear:
    """Put a fitted head's weights into a layer, in the layer's precision."""
    head.weight.copy_(fitted.weight_CF)
    if head.bias is not None:
        head.bias.copy_(fitted.bias_C)
    return head
