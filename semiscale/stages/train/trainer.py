"""Train one model: the loop, and the fields of its receipt."""

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import GracefulStop
from semiscale.data.labeled import LabeledShard, load_packed_shards, load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader
from semiscale.models import checkpoint_io, networks
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.observability.progress import log_info
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import CurvePoint
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress
from semiscale.stages.train.checkpoint_writer import CheckpointWriter
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.data_stall import data_stall_timer
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.finite_loss_guard import FiniteLossGuard
from semiscale.stages.train.initial_weights import build_initial_model
from semiscale.stages.train.input_pipeline.dataset import TrainDataset
from semiscale.stages.train.input_pipeline.device_loader import device_batches
from semiscale.stages.train.metrics_logger import MetricsLogger
from semiscale.stages.train.recipes import Recipe, learning_rate_at
from semiscale.stages.train.train_state import TrainState
from semiscale.stages.train.train_step import TrainStep, input_shape, split_microbatches
from semiscale.stages.train.validator import Validator
from semiscale.storage.documents import load_document

if TYPE_CHECKING:
    from semiscale.stages.train.input_pipeline.augmentation import Augment

# Points of the learning curve, at equally spaced steps.
CURVE_POINTS = 100
# Validations, at equally spaced steps. It divides CURVE_POINTS, so that every validation falls on a point of the curve.
VALIDATION_COUNT = 10


def run_training(
    config: TrainConfig, folder: str, ranks: DistributedContext, stopping: GracefulStop
) -> dict[str, object]:
    """Train, save the model in `folder`, and broadcast the fields of the receipt.

    Args:
        config: The training.
        folder: URI of the training's folder.
        ranks: This process among those of the training.
        stopping: The request to stop of this process.

    Returns:
        The fields of the receipt, the same on every rank.

    Raises:
        SemiscaleError: The device has too little memory.
    """
    checkpoint_io.configure_torch()
    device = checkpoint_io.default_device()
    if device.type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    with ranks.process_group(device.type == "cuda"):
        try:
            fields = _train(config, folder, ranks, stopping)
        except torch.OutOfMemoryError as error:
            raise SemiscaleError(
                "SEMI-E230",
                f"train: {str(error).splitlines()[0]} Lower device_batch_size, which is {config.device_batch_size}: "
                "gradients still add up to batch_size.",
            ) from None
        return dict(ranks.broadcast_from_main(fields))


def _train(config: TrainConfig, folder: str, ranks: DistributedContext, stopping: GracefulStop) -> dict[str, object]:
    if config.batch_size < ranks.count:
        raise InvalidInputError(
            "SEMI-E231",
            f"batch_size: {config.batch_size} images are fewer than {ranks.count} ranks. Give one for each at least.",
        )
    plan = load_document(config.plan, PlanReceipt)
    preprocessing = config.preprocessing
    columns = SampleFields(config.image_column, config.label_column, config.frames > 0)
    augment = _build_augment(config.resolved_recipe, preprocessing)
    data = TrainDataset(_load_shards(config, plan), columns, preprocessing, config.seed, ranks, augment)
    validation = EvalLoader(plan.validation, columns, preprocessing) if ranks.is_main else None
    total = config.images_processed + config.epochs * plan.train.samples
    model, source = build_initial_model(config, plan)
    if 1 in _microbatch_sizes(config, ranks):
        networks.check_batch_norm_batch(model, config.architecture, (1, *input_shape(config)))
    trainer = Trainer(
        config, model.to(checkpoint_io.default_device()), validation, data, total, folder, ranks, stopping
    )
    trainer.fit()
    description = CheckpointMetadata(
        architecture=config.architecture,
        classes=plan.classes,
        preprocessing=preprocessing,
        recipe=config.recipe,
        digest=config.digest(),
    )
    return {
        "recipe": config.recipe,
        "architecture": config.architecture,
        "checkpoint": checkpoint_io.save_model(trainer.eval_model, description, folder) if ranks.is_main else "",
        "source": source,
        "parameters": sum(parameter.numel() for parameter in trainer.eval_model.parameters()),
        "classes": plan.classes,
        "preprocessing": preprocessing,
        "images_processed": trainer.images_processed,
        "samples": data.samples,
        "learning_rate": config.learning_rate,
        "validation_top1": trainer.curve[-1].validation_top1,
        "curve": trainer.curve,
        "images_per_s": trainer.images_processed / trainer.seconds,
    }


def _microbatch_sizes(config: TrainConfig, ranks: DistributedContext) -> set[int]:
    """Return the sizes of the microbatches of all ranks."""
    shares = {config.batch_size // ranks.count, math.ceil(config.batch_size / ranks.count)}
    return {part.stop - part.start for share in shares for part in split_microbatches(share, config.device_batch_size)}


def _build_augment(recipe: Recipe, preprocessing: Preprocessing) -> "Augment | None":
    if not recipe.trivial_augment:
        return None
    # This imports torchvision, which takes eight CPU-seconds. Only recipes that need it pay for it.
    from semiscale.stages.train.input_pipeline.augmentation import Augment

    return Augment(preprocessing, recipe.erasing)


def _load_shards(config: TrainConfig, plan: PlanReceipt) -> list[LabeledShard]:
    if config.resolved_recipe.learns_from == "labeled":
        return load_split(plan.train)
    if not config.packed:
        raise InvalidInputError(
            "SEMI-E232", f"train: recipe {config.recipe} needs the receipt of the pack stage. Give it as --packed."
        )
    return load_packed_shards(load_document(config.packed, PackReceipt).shards)


class Trainer:
    """Train one model on one rank, from the newest checkpoint there is.

    The constructor restores the checkpoint and contains broadcasts, so every rank must build one.

    Args:
        config: The training.
        model: The network on its device.
        validation: The validation split. It is None on all ranks but rank 0.
        data: The training set.
        total: Images to process. The last batch is always a full one.
        folder: URI of the training's folder.
        ranks: This process among those of the training.
        stopping: The request to stop of this process.

    Raises:
        SemiscaleError: The ranks see different checkpoints.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        validation: EvalLoader | None,
        data: TrainDataset,
        total: int,
        folder: str,
        ranks: DistributedContext,
        stopping: GracefulStop,
    ) -> None:
        self._config, self._ranks, self._stopping = config, ranks, stopping
        device, size = checkpoint_io.default_device(), config.batch_size
        self._steps = max(math.ceil(total / size), 1)
        self._name = f"{config.recipe} {config.architecture}, learning rate {config.learning_rate:g} for 256 images"
        log_info("train", f"{self._name}: {self._steps:,} steps of {size:,} images, on {data.samples:,} samples")

        # Restore the newest checkpoint first: the parts below begin at its step.
        self._state = TrainState(config, model, self._steps)
        self._checkpoints = CheckpointManager(folder)
        progress = self._broadcast_restore()
        self._done = progress.step if progress else 0
        self.curve: list[CurvePoint] = list(progress.curve) if progress else []
        self.seconds = progress.seconds if progress else 0.0
        # Whether the last curve point still lacks its validation, which SIGTERM interrupted.
        self._validation_pending = (
            progress is not None
            and _is_due(self._done, self._steps, VALIDATION_COUNT)
            and self.curve[-1].validation_top1 is None
        )

        self._batches = device_batches(data, size, self._steps, self._done, device)
        self._train_step = TrainStep(config, self._state, self._steps, self._done, device, ranks)
        self._validator = Validator(validation, device, ranks, stopping)
        self._guard = FiniteLossGuard(self._name, folder, size, self._steps, device, ranks)
        self._stall_timer = data_stall_timer(device)
        self._metrics = (
            MetricsLogger(folder, config.recipe, self._steps * size, self._done * size) if ranks.is_main else None
        )
        self._writer = CheckpointWriter(
            self._checkpoints, self._name, 60 * config.checkpoint_minutes, shares_cpu=device.type == "cpu"
        )
        self._started_at = time.monotonic() - self.seconds

    @property
    def eval_model(self) -> nn.Module:
        """The model that is measured and saved: the averaged one if the recipe averages."""
        return self._state.eval_model

    @property
    def images_processed(self) -> int:
        """Images that the whole training processes."""
        return self._steps * self._config.batch_size

    def fit(self) -> None:
        """Train until all images are processed.

        Every step all-reduces, so every rank must call it.

        Raises:
            TerminatedError: SIGTERM arrived. A checkpoint has been saved.
            SemiscaleError: The loss is not finite.
        """
        config, size = self._config, self._config.batch_size
        self._state.model.train()
        with self._stopping.deferred():
            if self._validation_pending:
                self._all_reduce_finish_curve_point(self._done)
            if self._validation_pending:
                self._stopping.raise_now()
            for step in range(self._done + 1, self._steps + 1):
                is_stop_requested = self._ranks.all_reduce_any_async(self._stopping.is_requested)

                batch = self._stall_timer.next_batch(self._batches)
                rate = learning_rate_at(
                    config.resolved_recipe, config.learning_rate, size, (step - 1) * size, self._steps * size
                )
                loss = self._train_step.all_reduce_step(batch, rate, step)
                self._guard.record(step, rate, batch.keys, loss)
                self._stall_timer.record_step_end()

                is_curve_point = _is_due(step, self._steps, CURVE_POINTS)
                if is_curve_point or self._guard.is_check_due(step):
                    self._guard.all_reduce_check()
                if self._metrics:
                    self._metrics.log_step(size, rate, loss.item, self._stall_timer.take_stall_seconds())
                if is_curve_point:
                    mean_loss = self._ranks.all_reduce_mean(loss).item()
                    self.curve.append(CurvePoint(images_processed=step * size, learning_rate=rate, loss=mean_loss))
                    self._all_reduce_finish_curve_point(step)

                if is_stop_requested() or self._validation_pending:
                    self._save(step)
                    self._writer.wait()
                    # Barrier: keep all ranks alive until rank 0 has written the checkpoint. torchrun kills the
                    # remaining ranks soon after one exits.
                    self._ranks.broadcast_from_main(step)
                    self._stopping.raise_now()
                if self._ranks.is_main and self._writer.is_due():
                    self._save(step)
            if self._done < self._steps:
                self._save(self._steps)
                self._writer.wait()
        self.seconds = time.monotonic() - self._started_at
        if self._metrics:
            self._metrics.flush()
            log_info("train", f"{self._name}: validation top-1 {self.curve[-1].validation_top1:.4f}")

    def _all_reduce_finish_curve_point(self, step: int) -> None:
        """Validate the last curve point if that is due, and log it. This all-reduces.

        If SIGTERM interrupts validation, the curve point is saved without a score and not logged. The resumed process
        runs that validation before its first step.
        """
        self._validation_pending = _is_due(step, self._steps, VALIDATION_COUNT) and not self._all_reduce_validate()
        if self._metrics and not self._validation_pending:
            self._metrics.log(self.curve[-1].model_dump(exclude={"images_processed"}, exclude_none=True))

    def _all_reduce_validate(self) -> bool:
        """Validate the model, and add the score to the last curve point.

        This all-reduces. It returns whether the validation is complete.
        """
        result = self._validator.all_reduce_validate(self.eval_model)
        if result.top1 is not None:
            self.curve[-1] = self.curve[-1].model_copy(update={"validation_top1": result.top1})
        return result.is_complete

    def _save(self, step: int) -> None:
        """Begin to write a checkpoint on rank 0. All ranks have the same state."""
        if not self._ranks.is_main:
            return
        self._guard.check_this_rank()
        # Flush the metrics first. A resumed process drops lines past the checkpoint, but cannot restore missing ones.
        assert self._metrics
        self._metrics.flush()
        progress = TrainerProgress(
            step=step,
            images_processed=step * self._config.batch_size,
            ranks=self._ranks.count,
            seconds=time.monotonic() - self._started_at,
            curve=list(self.curve),
        )
        self._writer.save(progress, self._state.state_dict())

    def _broadcast_restore(self) -> TrainerProgress | None:
        """Restore the newest checkpoint. A broadcast checks that all ranks see the same."""
        newest = self._checkpoints.load_latest()
        step = newest[0].step if newest else 0
        if self._ranks.broadcast_from_main(step) != step:
            raise SemiscaleError(
                "SEMI-E236", "train: the ranks see different checkpoints. Give all of them the same workdir."
            )
        if not newest:
            return None
        progress, tensors = newest
        self._state.load_state_dict(tensors)
        now = self._ranks.count
        ranks = "" if progress.ranks == now else f" by {progress.ranks} ranks, now with {now}"
        log_info("train", f"{self._name}: going on after {progress.images_processed:,} images{ranks}")
        return progress


def _is_due(step: int, steps: int, times: int) -> bool:
    """Return whether one of `times` equally spaced events falls on this step.

    The last step always has one.
    """
    return step * times // steps > (step - 1) * times // steps
