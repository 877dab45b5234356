"""Import a pretrained teacher.

It is checked before it is used, and saved as a checkpoint of this program. No later stage reads a foreign file.
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

# Validation images that a teacher is checked on.
CHECKED_IMAGES = 1000
# The accuracy must exceed chance by this many standard errors.
STANDARD_ERRORS = 3.0
# A class with fewer images is not examined for swapped classes.
MIN_IMAGES_PER_CLASS = 10


def import_teacher(config: TrainConfig, folder: str) -> dict[str, object]:
    """Check a pretrained model, and save it in `folder`.

    The receipt's digest depends on the bytes of the file, the architecture, the classes and the preprocessing alone. A
    run with other trainings or more labels therefore finds the scores of the same teacher.

    Args:
        config: The training, which names the checkpoint.
        folder: URI of its folder.

    Returns:
        The fields of the receipt.

    Raises:
        InvalidInputError: The digest, architecture, classes, preprocessing or accuracy do not fit the run.
    """
    checkpoint_io.configure_torch()
    plan = load_document(config.plan, PlanReceipt)
    checkpoint = checkpoint_metadata.parse_checkpoint_ref(config.checkpoint, "checkpoint")
    read = pretrained_weights.read_state_dict(checkpoint)
    preprocessing = config.preprocessing
    description = checkpoint_metadata.CheckpointMetadata(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=preprocessing,
        recipe=config.recipe,
        digest=content_digest(read.sha256, config.architecture, plan.classes, preprocessing.model_dump()),
    )
    checkpoint_metadata.check_compatible(checkpoint.uri, config.checkpoint_classes, description)
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
    """Return the accuracy that a teacher must exceed.

    It is three standard errors above that of always predicting the most frequent class. If the set is too small for
    that, such as three images of three classes, the teacher must classify every image correctly.

    Args:
        labels: Classes of the images.
    """
    images = len(labels)
    chance = max(np.bincount(labels)) / images
    above_chance = chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / images)
    return float(min(above_chance, 1 - 1 / images))


def swapped_classes(labels: list[int], predicted: list[int]) -> dict[int, int]:
    """Find classes that the model seems to have in another order.

    Such classes form cycles of two or more. More than half of the images of each are classified as the next one. The
    accuracy alone would not show it, because two swapped classes of ten cost only a fifth of it. With more than
    CHECKED_IMAGES / MIN_IMAGES_PER_CLASS classes there are too few images.

    Args:
        labels: Classes of the images.
        predicted: Their best classes by the model.

    Returns:
        The next class of each class in a cycle.
    """
    images = Counter(labels)
    next_class = {
        label: other
        for (label, other), count in Counter(zip(labels, predicted, strict=True)).items()
        if label != other and count > images[label] / 2 and images[label] >= MIN_IMAGES_PER_CLASS
    }
    # Remove the ends of chains until only cycles are left.
    while ends := [
        label for label, other in next_class.items() if other not in next_class or label not in next_class.values()
    ]:
        for label in ends:
            del next_class[label]
    return next_class


def _check_class_order(config: TrainConfig, classes: list[str], labels: list[int], predicted: list[int]) -> None:
    """Raise InvalidInputError if classes seem to be swapped.

    The check is made if neither the config nor the file names the order of the classes.
    """
    has_class_names = config.checkpoint_classes or checkpoint_metadata.read_metadata(
        checkpoint_metadata.parse_checkpoint_ref(config.checkpoint, "checkpoint").uri
    )
    if not has_class_names and (swapped := swapped_classes(labels, predicted)):
        label, other = next(iter(swapped.items()))
        raise InvalidInputError(
            "SEMI-E246",
            f"{config.checkpoint}: Most images of {classes[label]!r} are classified as {classes[other]!r}, and the "
            f"other way round, directly or through other classes. The model's classes seem to be in another order. "
            "Name them in teacher_classes.",
        )


def _check_accuracy(config: TrainConfig, model: nn.Module, classes: list[str], split: LabeledSplit) -> float:
    """Return the top-1 accuracy on a split, or raise InvalidInputError if it is low."""
    columns = SampleFields(config.image_column, config.label_column, config.frames > 0)
    loader = EvalLoader(split, columns, config.preprocessing)
    logits_BC = predict_logits(model.to(checkpoint_io.default_device()), loader, checkpoint_io.default_device())
    top1 = float(topk_correct(logits_BC.topk(1).indices, loader.labels_B, 1).double().mean())
    labels = loader.labels_B.tolist()
    min_top1 = min_accepted_accuracy(labels)
    result = f"top-1 {top1:.2%} on {split.samples:,} validation images"
    # Logits that are not numbers are refused here too, because they are no better than chance.
    if not top1 > min_top1:
        raise InvalidInputError(
            "SEMI-E247",
            f"{config.checkpoint}: The model has {result}, and a teacher must exceed {min_top1:.2%}, clearly more than "
            "chance. Check the order of its classes and its preprocessing.",
        )
    _check_class_order(config, classes, labels, logits_BC.argmax(1).tolist())
    log_info("train", f"{config.checkpoint}: {result}; used as it is")
    return top1


def _sample_split(split: LabeledSplit, folder: str) -> LabeledSplit:
    """Return at most CHECKED_IMAGES random samples of a split.

    They are the same ones every time. Their index is written in `folder`.
    """
    if split.samples <= CHECKED_IMAGES:
        return split
    table = pq.read_table(io.BytesIO(storage.read_bytes(split.index)))
    rows = np.sort(np.random.default_rng(0).choice(len(table), CHECKED_IMAGES, replace=False))
    sampled = table.take(rows)
    uri = storage.join(folder, "tried-on.parquet")
    write_parquet(sampled, uri)
    counts = np.bincount(sampled["label"].to_numpy(), minlength=len(split.class_counts))
    return split.model_copy(update={"index": uri, "samples": CHECKED_IMAGES, "class_counts": counts.tolist()})
