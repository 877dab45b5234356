"""A ready-made teacher: checked before it is used, and kept as a checkpoint of ours, so that no later stage reads a
foreign file."""

import io
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
from torch import nn

from components.shared import checkpoints, models, storage, weights
from components.shared.errors import Refused
from components.shared.predict import PreparedSplit, hits, logits
from components.shared.progress import say
from components.shared.receipts import PlanReceipt, Split, load
from components.shared.shards import Columns
from components.shared.stage import digest
from components.train.config import TrainConfig

SLICE = 1000  # labeled images that a teacher is tried on
STANDARD_ERRORS = 3.0
LEAST_IMAGES = 10  # of a class, for saying what they are mostly taken for


def run(config: TrainConfig, folder: str) -> dict[str, object]:
    """Check a ready-made model, save it as a checkpoint in `folder`, and return the fields of the receipt.

    Raises Refused where its digest, its architecture, its classes, its preprocessing or its accuracy is not what the
    run needs. The receipt's digest is of the file's bytes and of what they are taken for, so that a run with other
    trainings, or more labels, finds the scores of the same teacher.
    """
    models.set_up()
    plan = load(config.plan, PlanReceipt)
    pinned = checkpoints.pinned(config.checkpoint, "checkpoint")
    read = weights.read(pinned)
    preprocessing = config.preprocessing
    description = checkpoints.Description(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=preprocessing,
        recipe=config.recipe,
        digest=digest(read.sha256, config.architecture, plan.classes, preprocessing.model_dump()),
    )
    checkpoints.refuse_unlike(pinned.uri, config.checkpoint_classes, description)
    model = models.build(config.architecture, len(plan.classes), config.resolution)
    weights.fit(model, config.architecture, read)
    top1 = _tried(config, model, plan.classes, _slice(plan.validation, folder))
    return {
        "digest": description.digest,
        "recipe": config.recipe,
        "architecture": config.architecture,
        "checkpoint": models.save(model.cpu(), description, folder),
        "source": read.source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": plan.classes,
        "preprocessing": preprocessing,
        "images_processed": 0,
        "samples": 0,
        "learning_rate": 0.0,
        "validation_top1": top1,
        "curve": [],
        "images_per_s": 0.0,
    }


def least_top1(labels: list[int]) -> float:
    """Return the accuracy that a teacher must exceed: three standard errors above answering the commonest class.

    Of a set too small for that, such as three images of three classes, it must get every image right.
    """
    images = len(labels)
    chance = max(np.bincount(labels)) / images
    clearly = chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / images)
    return float(min(clearly, 1 - 1 / images))


def exchanged(labels: list[int], best: list[int]) -> dict[int, int]:
    """Return classes that are taken for each other, two of them or more in a circle: which one for which.

    More than half of a class's images must be taken for the next one. Two exchanged classes of ten cost a fifth of the
    accuracy, which alone would not tell. Of more than SLICE / LEAST_IMAGES classes the slice has too few images.
    """
    images = Counter(labels)
    mostly = {
        label: other
        for (label, other), count in Counter(zip(labels, best, strict=True)).items()
        if label != other and count > images[label] / 2 and images[label] >= LEAST_IMAGES
    }
    while ends := [label for label, other in mostly.items() if other not in mostly or label not in mostly.values()]:
        for label in ends:
            del mostly[label]
    return mostly


def _refuse_exchanged(config: TrainConfig, classes: list[str], labels: list[int], best: list[int]) -> None:
    """Raise Refused where a model's classes seem to be in another order, and nothing says which they are in."""
    said = config.checkpoint_classes or checkpoints.described(checkpoints.pinned(config.checkpoint, "checkpoint").uri)
    if not said and (found := exchanged(labels, best)):
        label, other = next(iter(found.items()))
        raise Refused(
            f"{config.checkpoint}: images of {classes[label]!r} are mostly taken for {classes[other]!r}, and those, "
            f"in the end, for {classes[label]!r}: its classes seem to be in another order; name them in "
            "teacher_classes, and this is not asked"
        )


def _tried(config: TrainConfig, model: nn.Module, classes: list[str], on: Split) -> float:
    columns = Columns(config.image_column, config.label_column, config.frames > 0)
    prepared = PreparedSplit(on, columns, config.preprocessing)
    found = logits(model.to(models.device()), prepared, models.device())
    top1 = float(hits(found, prepared.labels_B, 1).double().mean())
    least = least_top1(prepared.labels_B.tolist())
    said = f"top-1 {top1:.2%} on {on.samples:,} validation images"
    if not top1 > least:  # nor where the logits are no numbers
        raise Refused(
            f"{config.checkpoint}: {said}, and a teacher of these classes must exceed {least:.2%}, clearly more than "
            "chance; are its classes in the run's order, and its preprocessing the run's?"
        )
    _refuse_exchanged(config, classes, prepared.labels_B.tolist(), found.argmax(1).tolist())
    say("train", f"{config.checkpoint}: {said}; used as it is")
    return top1


def _slice(split: Split, folder: str) -> Split:
    """Return at most SLICE random samples of a split, the same ones every time, listed in `folder`."""
    if split.samples <= SLICE:
        return split
    table = pq.read_table(io.BytesIO(storage.read(split.index)))
    chosen = np.sort(np.random.default_rng(0).choice(len(table), SLICE, replace=False))
    part = table.take(chosen)
    buffer = io.BytesIO()
    pq.write_table(part, buffer)
    uri = storage.join(folder, "tried-on.parquet")
    storage.write(uri, buffer.getvalue())
    counts = np.bincount(part["label"].to_numpy(), minlength=len(split.class_counts))
    return split.model_copy(update={"index": uri, "samples": SLICE, "class_counts": counts.tolist()})
