"""The training loop, and what a finished training hands on. Only this module of the stage knows torch."""

import json
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from components.shared import models, storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.predict import PreparedSplit, hits, logits
from components.shared.preprocess import Batch
from components.shared.progress import Progress, say
from components.shared.receipts import PackReceipt, PlanReceipt, Point, Preprocessing, load
from components.shared.shards import Columns, Shard
from components.shared.splits import LabeledShard, read_split
from components.train.config import TrainConfig
from components.train.data import TrainingData
from components.train.recipes import RECIPES, learning_rate
from components.train.start import starting_model

MOMENTUM = 0.9  # He et al. 2016; the paper says synchronous SGD
CURVE_POINTS = 100
VALIDATIONS = 8


def run(config: TrainConfig, folder: str) -> dict[str, object]:
    """Train, save the checkpoint in `folder`, and return the fields of the receipt."""
    models.use_threads()
    plan = load(config.plan, PlanReceipt)
    preprocessing = Preprocessing(resolution=config.resolution, augmentation=config.augmentation)
    columns = Columns(config.image_column, config.label_column)
    data = TrainingData(_shards(config, plan), columns, preprocessing, config.seed)
    validation = PreparedSplit(plan.validation, columns, preprocessing)
    total = config.images_processed + config.epochs * plan.train.samples
    model, source = starting_model(config, plan)
    model.to(models.device())
    started = time.monotonic()
    curve = _Loop(config, model, validation, total).run(data)
    seconds = time.monotonic() - started
    description = models.Description(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=preprocessing,
        recipe=config.recipe,
        digest=config.digest(),
    )
    return {
        "recipe": config.recipe,
        "architecture": config.architecture,
        "checkpoint": models.save(model, description, folder),
        "source": source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": plan.classes,
        "preprocessing": preprocessing,
        "images_processed": total,
        "samples": data.samples,
        "learning_rate": config.learning_rate,
        "validation_top1": curve[-1].validation_top1,
        "curve": curve,
        "images_per_s": total / seconds,
    }


def _shards(config: TrainConfig, plan: PlanReceipt) -> list[LabeledShard]:
    if config.recipe != "pretrain":
        return read_split(plan.train)
    if not config.packed:
        raise Refused("train: recipe pretrain needs --packed, the receipt of the pack stage")
    packed = load(config.packed, PackReceipt)
    listed = json.loads(storage.read(packed.shards))
    return [LabeledShard(Shard.model_validate(item["shard"]), dict(enumerate(item["labels"]))) for item in listed]


class _Loop:
    """The training loop of one model: its optimizer, its schedule, its curve."""

    def __init__(self, config: TrainConfig, model: nn.Module, validation: PreparedSplit, total: int) -> None:
        self._config, self._model, self._validation, self._total = config, model, validation, total
        self._device = models.device()
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=config.learning_rate, momentum=MOMENTUM, weight_decay=config.weight_decay
        )
        self._name = f"{config.recipe} {config.architecture}, learning rate {config.learning_rate:g}"

    def run(self, data: TrainingData) -> list[Point]:
        """Train on batches of a fixed size until `total` images are processed; returns the curve."""
        size, recipe = self._config.batch_size, RECIPES[self._config.recipe]
        steps = max(math.ceil(self._total / size), 1)
        say("train", f"{self._name}: {self._total:,} images, {steps:,} steps, on {data.samples:,} samples")
        progress = Progress("train", steps * size)
        curve: list[Point] = []
        self._model.train()
        for step, (images_BHWC, labels_B) in enumerate(data.batches(size, steps), start=1):
            rate = learning_rate(recipe, self._config.learning_rate, size, (step - 1) * size, steps * size)
            loss = self._step(images_BHWC, torch.from_numpy(labels_B), rate)
            if _due(step, steps, CURVE_POINTS):
                validated = self._top1() if _due(step, steps, VALIDATIONS) else None
                curve.append(self._point(step, rate, loss.item(), validated))
            progress.add(size, f"{self._name}")
        say("train", f"{self._name}: validation top-1 {curve[-1].validation_top1:.4f}")
        return curve

    def _step(self, images_BHWC: Batch, labels_B: torch.Tensor, rate: float) -> torch.Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        images_BCHW = models.normalised(images_BHWC, self._validation.preprocessing, self._device)
        loss = F.cross_entropy(self._model(images_BCHW), labels_B.to(self._device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss

    def _top1(self) -> float:
        found = hits(logits(self._model, self._validation, self._device), self._validation.labels_B, 1)
        return float(found.float().mean())

    def _point(self, step: int, rate: float, loss: float, validated: float | None) -> Point:
        images = step * self._config.batch_size
        if not math.isfinite(loss):
            raise SemiscaleError(f"train: {self._name}: the loss is {loss} after {images:,} images; lower the rate")
        return Point(images_processed=images, learning_rate=rate, loss=loss, validation_top1=validated)


def _due(step: int, steps: int, times: int) -> bool:
    """Say whether one of `times` equally spaced events falls on this step; the last step always has one."""
    return step * times // steps > (step - 1) * times // steps
