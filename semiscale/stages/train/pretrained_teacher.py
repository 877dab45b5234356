"""A ready-made teacher: checked before it is used, and kept as a checkpoint of ours, so that no later stage reads a
foreign file.
"""

import io
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
from torch import nn

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.evaluation.metrics import topk_correct
from semiscale.models import checkpoint_io, checkpoint_metadata, networks, pretrained_weights
from semiscale.observability.progress import log_info
from semiscale.receipts.plan import PlanReceipt
from semiscale.stages.train.config import TrainConfig
from semiscale.storage.documents import load_document
from semiscale.storage.parquet import write_parquet

CHECKED_IMAGES = 1000  # labeled images that a teacher is tried on
STANDARD_ERRORS = 3.0
MIN_IMAGES_PER_CLASS = 10  # of a class, for saying what they are mostly taken for


def import_teacher(config: TrainConfig, folder: str) -> dict[str, object]:
    """Check a ready-made model, save it as a checkpoint in `folder`, and return the fields of the receipt.

    Raises InvalidInputError where its digest, its architecture, its classes, its preprocessing or its accuracy is
    not what the
    run needs. The receipt's digest is of the file's bytes and of what they are taken for, so that a run with other
    trainings, or more labels, finds the scores of the same teacher.
    """
    checkpoint_io.configure_torch()
    plan = load_document(config.plan, PlanReceipt)
    pinned = checkpoint_metadata.parse_checkpoint_ref(config.checkpoint, "checkpoint")
    read = pretrained_weights.read_state_dict(pinned)
    preprocessing = config.preprocessing
    description = checkpoint_metadata.CheckpointMetadata(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=preprocessing,
        recipe=config.recipe,
        digest=content_digest(read.sha256, config.architecture, plan.classes, preprocessing.model_dump()),
    )
    checkpoint_metadata.check_compatible(pinned.uri, config.checkpoint_classes, description)
    model = networks.build_model(config.architecture, len(plan.classes), config.resolution)
    pretrained_weights.load_strict(model, config.architecture, read)
    top1 = _check_accuracy(config, model, plan.classes, _sample_split(plan.validation, folder))
    return {
        "digest": description.digest,
        "recipe": config.recipe,
        "architecture": config.architecture,
        "checkpoint": checkpoint_io.save_model(model.cpu(), description, folder),
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


def min_accepted_accuracy(labels: list[int]) -> float:
    """Return the accuracy that a teacher must exceed: three standard errors above answering the commonest class.

    Of a set too small for that, such as three images of three classes, it must get every image right.
    """
    images = len(labels)
    chance = max(np.bincount(labels)) / images
    clearly = chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / images)
    return float(min(clearly, 1 - 1 / images))


def swapped_classes(labels: list[int], best: list[int]) -> dict[int, int]:
    """Return classes that are taken for each other, two of them or more in a circle: which one for which.

    More than half of a class's images must be taken for the next one. Two exchanged classes of ten cost a fifth of the
    accuracy, which alone would not tell. Of more than SLICE / LEAST_IMAGES classes the slice has too few images.
    """
    images = Counter(labels)
    mostly = {
        label: other
        for (label, other), count in Counter(zip(labels, best, strict=True)).items()
        if label != other and count > images[label] / 2 and images[label] >= MIN_IMAGES_PER_CLASS
    }
    while ends := [label for label, other in mostly.items() if other not in mostly or label not in mostly.values()]:
        for label in ends:
            del mostly[label]
    return mostly


def _refuse_exchanged(config: TrainConfig, classes: list[str], labels: list[int], best: list[int]) -> None:
    """Raise InvalidInputError where a model's classes seem to be in another order, and nothing says which they are
    in.
    """
    said = config.checkpoint_classes or checkpoint_metadata.read_metadata(
        checkpoint_metadata.parse_checkpoint_ref(config.checkpoint, "checkpoint").uri
    )
    if not said and (found := swapped_classes(labels, best)):
        label, other = next(iter(found.items()))
        raise InvalidInputError(
            "SEMI-E246",
            f"{config.checkpoint}: Most images of {classes[label]!r} are classified as {classes[other]!r}, and the "
            f"other way round, directly or through other classes. The model's classes seem to be in another order. "
            "Name them in teacher_classes.",
        )


def _check_accuracy(config: TrainConfig, model: nn.Module, classes: list[str], on: LabeledSplit) -> float:
    columns = SampleFields(config.image_column, config.label_column, config.frames > 0)
    prepared = EvalLoader(on, columns, config.preprocessing)
    found = predict_logits(model.to(checkpoint_io.default_device()), prepared, checkpoint_io.default_device())
    top1 = float(topk_correct(found.topk(1).indices, prepared.labels_B, 1).double().mean())
    least = min_accepted_accuracy(prepared.labels_B.tolist())
    said = f"top-1 {top1:.2%} on {on.samples:,} validation images"
    if not top1 > least:  # nor where the logits are no numbers
        raise InvalidInputError(
            "SEMI-E247",
            f"{config.checkpoint}: The model has {said}, and a teacher must exceed {least:.2%}, clearly more than "
            "chance. Check the order of its classes and its preprocessing.",
        )
    _refuse_exchanged(config, classes, prepared.labels_B.tolist(), found.argmax(1).tolist())
    log_info("train", f"{config.checkpoint}: {said}; used as it is")
    return top1


def _sample_split(split: LabeledSplit, folder: str) -> LabeledSplit:
    """Return at most SLICE random samples of a split, the same ones every time, listed in `folder`."""
    if split.samples <= CHECKED_IMAGES:
        return split
    table = pq.read_table(io.BytesIO(storage.read_bytes(split.index)))
    chosen = np.sort(np.random.default_rng(0).choice(len(table), CHECKED_IMAGES, replace=False))
    part = table.take(chosen)
    uri = storage.join(folder, "tried-on.parquet")
    write_parquet(part, uri)
    counts = np.bincount(part["label"].to_numpy(), minlength=len(split.class_counts))
    return split.model_copy(update={"index": uri, "samples": CHECKED_IMAGES, "class_counts": counts.tolist()})
