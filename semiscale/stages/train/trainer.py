"""The training loop, and what a finished training hands on. Only this module and those below it know torch."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import GracefulStop, TerminatedError
from semiscale.data.labeled import LabeledShard, load_packed_shards, load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.evaluation.metrics import topk_correct
from semiscale.models import checkpoint_io, execution_mode, networks
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.execution_mode import ExecutionMode
from semiscale.models.normalization import Normalize
from semiscale.observability.progress import log_info
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import CurvePoint
from semiscale.stages.train import loss
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.data_stall import data_stall_timer
from semiscale.stages.train.dataset import TrainDataset
from semiscale.stages.train.device_loader import DeviceBatch, device_batches
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.initial_weights import build_initial_model
from semiscale.stages.train.metrics_logger import MetricsLogger
from semiscale.stages.train.model_ema import ModelEma
from semiscale.stages.train.recipes import Recipe, learning_rate_at
from semiscale.storage.documents import load_document

if TYPE_CHECKING:
    from semiscale.stages.train.augmentation import Augment

MOMENTUM = 0.9  # He et al. 2016; the paper says synchronous SGD
CURVE_POINTS = 100
VALIDATION_COUNT = 10  # divides CURVE_POINTS, so that each falls on a point of the curve, however many steps there are
FINITE_CHECK_INTERVAL = {"cpu": 1, "cuda": 16}  # steps: asking a GPU for the loss waits for it
MAX_KEYS_IN_MESSAGE = 10  # of a batch whose loss is no number; all are in a file


def run_training(
    config: TrainConfig, folder: str, ranks: DistributedContext, stopping: GracefulStop
) -> dict[str, object]:
    """Train, save the checkpoint in `folder`, and return the fields of the receipt, on every rank the same.

    Raises SemiscaleError where the device's memory does not do.
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
                f"train: {str(error).splitlines()[0]} Lower device_batch_size, which is {config.device_batch_size}: "
                "gradients still add up to batch_size"
            ) from None
        return dict(ranks.broadcast_from_main(fields))


def _train(config: TrainConfig, folder: str, ranks: DistributedContext, stopping: GracefulStop) -> dict[str, object]:
    if config.batch_size < ranks.count:
        raise InvalidInputError(
            f"batch_size: {config.batch_size} images for {ranks.count} ranks; expected one for each at least"
        )
    plan = load_document(config.plan, PlanReceipt)
    preprocessing = config.preprocessing
    columns = SampleFields(config.image_column, config.label_column, config.frames > 0)
    augment = _augment(config.resolved_recipe, preprocessing)
    data = TrainDataset(_shards(config, plan), columns, preprocessing, config.seed, ranks, augment)
    validation = EvalLoader(plan.validation, columns, preprocessing) if ranks.is_main else None
    total = config.images_processed + config.epochs * plan.train.samples
    model, source = build_initial_model(config, plan)
    if 1 in _microbatch_sizes(config, ranks):
        networks.check_batch_norm_batch(model, config.architecture, (1, *_input_shape(config)))
    training = Trainer(config, model.to(checkpoint_io.default_device()), validation, total, ranks)
    training.fit(data, folder, stopping)
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
        "checkpoint": checkpoint_io.save_model(training.eval_model, description, folder) if ranks.is_main else "",
        "source": source,
        "parameters": sum(parameter.numel() for parameter in training.eval_model.parameters()),
        "classes": plan.classes,
        "preprocessing": preprocessing,
        "images_processed": training.images_processed,
        "samples": data.samples,
        "learning_rate": config.learning_rate,
        "validation_top1": training.curve[-1].validation_top1,
        "curve": training.curve,
        "images_per_s": training.images_processed / training.seconds,
    }


def _microbatch_sizes(config: TrainConfig, ranks: DistributedContext) -> set[int]:
    """Return how many images are forwarded at a time, by whichever rank."""
    shares = {config.batch_size // ranks.count, math.ceil(config.batch_size / ranks.count)}
    return {part.stop - part.start for share in shares for part in split_microbatches(share, config.device_batch_size)}


def _input_shape(config: TrainConfig) -> tuple[int, ...]:
    """Return the axes of an image, CHW, or of a clip, CTHW."""
    return (3, *([config.frames] if config.frames else []), config.resolution, config.resolution)


def _augment(recipe: Recipe, preprocessing: Preprocessing) -> "Augment | None":
    if not recipe.trivial_augment:
        return None
    from semiscale.stages.train.augmentation import (
        Augment,  # it imports torchvision, eight CPU-seconds: for those who use it
    )

    return Augment(preprocessing, recipe.erasing)


def _shards(config: TrainConfig, plan: PlanReceipt) -> list[LabeledShard]:
    if config.resolved_recipe.learns_from == "labeled":
        return load_split(plan.train)
    if not config.packed:
        raise InvalidInputError(f"train: recipe {config.recipe} needs --packed, the receipt of the pack stage")
    return load_packed_shards(load_document(config.packed, PackReceipt).shards)


class _StepRecord(NamedTuple):
    """A step, for whom it may concern when its loss turns out to be no number."""

    step: int
    rate: float
    keys: list[str]


class Trainer:
    """One rank's part of the training of one model: its optimizer, its schedule, its curve.

    Synchronous SGD: every rank forwards and backwards its part of each batch, `device_batch_size` images at a time, the
    gradients are averaged over all (DistributedDataParallel), and every rank makes the same step. Batch normalisation
    sees the images that a device forwards at a time, as in the paper; its running statistics are rank 0's.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        validation: EvalLoader | None,
        total: int,
        ranks: DistributedContext,
    ) -> None:
        self._config, self._model, self._validation, self._ranks = config, model, validation, ranks
        self._recipe, self._device = config.resolved_recipe, checkpoint_io.default_device()
        self._steps = max(math.ceil(total / config.batch_size), 1)
        self._average = ModelEma(model, self._recipe, self._steps) if self._recipe.average else None
        self._normalise = Normalize(config.preprocessing, self._device)
        self._name = f"{config.recipe} {config.architecture}, learning rate {config.learning_rate:g}"
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self._device)
        self._bad_loss = torch.zeros((), device=self._device)
        self._recent: deque[_StepRecord] = deque(maxlen=max(FINITE_CHECK_INTERVAL.values()))
        self._mode = execution_mode.DEFAULT_TRAINING_MODE
        self._waiting = data_stall_timer(self._device)
        self._open = False  # whether the curve's last point lacks its validation, which was stopped
        self.curve: list[CurvePoint] = []
        self.seconds = 0.0

    @property
    def eval_model(self) -> nn.Module:
        """The model that is measured and kept: the averaged one, where the recipe averages."""
        return self._average.model if self._average else self._model

    @property
    def images_processed(self) -> int:
        """What the whole training processes: the last batch is a full one, whatever was asked for."""
        return self._steps * self._config.batch_size

    def fit(self, data: TrainDataset, folder: str, stopping: GracefulStop) -> None:
        """Train on batches of a fixed size until all images are processed, from the newest checkpoint there is.

        Raises TerminatedError on SIGTERM, after a checkpoint, and SemiscaleError where the loss stops being a number.
        """
        self._folder, self._checkpoints, self._stopping = folder, CheckpointManager(folder), stopping
        size = self._config.batch_size
        log_info("train", f"{self._name}: {self._steps:,} steps of {size:,} images, on {data.samples:,} samples")
        self._optimizer = self._build_optimizer()
        done = self._load_latest_checkpoint()
        batches = device_batches(data, size, self._steps, done, self._device)
        self._network = self._wrap_model(done)
        self._watch = (
            MetricsLogger(folder, self._config.recipe, self._steps * size, done * size) if self._ranks.is_main else None
        )
        self._started = self._saved = time.monotonic() - self.seconds
        self._saved = time.monotonic()
        self._model.train()
        with stopping.deferred():
            if self._open:
                self._finish_curve_point(done)
            if self._open:
                stopping.raise_now()
            for step in range(done + 1, self._steps + 1):
                told_to_stop = self._ranks.any_async(stopping.asked)
                self._run_step(step, batches)
                if told_to_stop() or self._open:
                    self._save(step)
                    self._ranks.broadcast_from_main(
                        step
                    )  # to the end: where one rank is gone, torchrun kills the others soon
                    stopping.raise_now()
                if self._ranks.is_main and time.monotonic() - self._saved >= 60 * self._config.checkpoint_minutes:
                    self._save(step)
            if done < self._steps:
                self._save(self._steps)
        self.seconds = time.monotonic() - self._started
        if self._watch:
            self._watch.flush()
            log_info("train", f"{self._name}: validation top-1 {self.curve[-1].validation_top1:.4f}")

    def _run_step(self, step: int, batches: Iterator[DeviceBatch]) -> None:
        """Make one step, and tell of it what is due."""
        size = self._config.batch_size
        batch = self._waiting.next_batch(batches)
        rate = learning_rate_at(self._recipe, self._config.learning_rate, size, (step - 1) * size, self._steps * size)
        loss = self._optimizer_step(batch, rate, step)
        self._waiting.step_submitted()
        if step % FINITE_CHECK_INTERVAL[self._device.type] == 0 or _is_due(step, self._steps, CURVE_POINTS):
            self._check_finite(self._ranks.all_reduce_min(self._first_nonfinite_step()))
        if self._watch:
            self._watch.log_step(size, rate, loss.item, self._waiting.take_stall_seconds())
        if _is_due(step, self._steps, CURVE_POINTS):
            self._add_curve_point(step, rate, self._ranks.all_reduce_mean(loss).item())

    def _optimizer_step(self, batch: DeviceBatch, rate: float, step: int) -> Tensor:
        """Make one step of SGD; returns the mean loss of this rank's images, on the device.

        The gradient is that of the mean over the whole batch, in however many parts it is computed: a part counts by
        its images, and the ranks' gradients are averaged, however many images and parts each rank has.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Of layers that draw at random, such as dropout: a function of the step, so that it can be repeated.
        torch.manual_seed((self._config.seed * self._steps + step) * self._ranks.count + self._ranks.rank)
        self._optimizer.zero_grad(set_to_none=True)
        parts = split_microbatches(len(batch.labels_B), self._config.device_batch_size)
        first = self._ranks.batch_slice(self._config.batch_size).start
        total = torch.zeros((), device=self._device)
        for part in parts:
            with self._no_sync() if part != parts[-1] else nullcontext():
                loss = self._loss(batch.images_BHWC[part], batch.labels_B[part], [step, first + part.start])
                share = (part.stop - part.start) * self._ranks.count / self._config.batch_size
                (loss * share).backward()
            total += loss.detach() * share
        self._optimizer.step()
        if self._average:
            self._average.update(step, self._model)
        fresh = (self._bad_step == 0) & ~total.isfinite()
        self._bad_step = torch.where(fresh, step, self._bad_step)
        self._bad_loss = torch.where(fresh, total, self._bad_loss)
        self._recent.append(_StepRecord(step, rate, batch.keys))
        return total

    def _loss(self, images_BHWC: Tensor, labels_B: Tensor, place: list[int]) -> Tensor:
        """Return the loss of a part by its place, step and position in the global batch: whichever rank has it, it is
        mixed alike.
        """
        images_BCHW = self._normalise(images_BHWC)
        seed = [self._config.seed, 3, *place]
        if self._device.type == "cpu":
            return loss.training_loss(self._network, images_BCHW, labels_B, self._recipe, seed)
        with torch.autocast("cuda", torch.bfloat16):
            images_BCHW = self._mode.to_memory_format(images_BCHW)
            return loss.training_loss(self._network, images_BCHW, labels_B, self._recipe, seed)

    def _no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the last part of the batch."""
        if self._ranks.count == 1:
            return nullcontext()
        return cast(DistributedDataParallel, self._network).no_sync()  # or what compiling made of one

    def _build_optimizer(self) -> torch.optim.SGD:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in self._model.modules():
            own = list(module.parameters(recurse=False))
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
            (others if norm and not self._recipe.decay_norms else decayed).extend(own)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=self._config.learning_rate,
            momentum=MOMENTUM,
            weight_decay=self._config.weight_decay,
            fused=True,  # on a CPU too, where it takes a fifth of the time: 0.05 s of a step of ResNet-50, not 0.25 s
        )

    def _wrap_model(self, done: int) -> nn.Module:
        """Return the network as it is run on this device, its gradients averaged over the ranks."""
        if self._device.type == "cuda":
            self._mode = self._choose_execution_mode(done)
        if self._average:
            self._mode.set_memory_format(self._average.model)
        return self._mode.wrap(self._model, self._ranks.ddp_wrapper())

    def _choose_execution_mode(self, done: int) -> ExecutionMode:
        """Let rank 0 say how all run the network: gradients in different memory formats could not be averaged."""
        parts = split_microbatches(
            math.ceil(self._config.batch_size / self._ranks.count), self._config.device_batch_size
        )
        size = parts[-1].stop - parts[-1].start
        images_BCHW = torch.rand(size, *_input_shape(self._config), device=self._device)
        averaging = self._ranks.ddp_wrapper(of_the_first=True)
        found = None
        if self._ranks.is_main:
            found = execution_mode.autotune_training(
                self._model, images_BCHW, (self._steps - done) * len(parts), averaging
            )
        return cast(ExecutionMode, self._ranks.broadcast_from_main(found))

    def _add_curve_point(self, step: int, rate: float, loss: float) -> None:
        images = step * self._config.batch_size
        self.curve.append(CurvePoint(images_processed=images, learning_rate=rate, loss=loss))
        self._finish_curve_point(step)

    def _finish_curve_point(self, step: int) -> None:
        """Validate the model of the curve's last point, where that is due, and tell of the point.

        The point stays open, and is not told, where the validation was stopped: then it is in a checkpoint of this very
        step, and who goes on closes it first.
        """
        self._open = _is_due(step, self._steps, VALIDATION_COUNT) and not self._validate()
        if self._watch and not self._open:
            told = self.curve[-1].model_dump(exclude={"images_processed"}, exclude_none=True)
            self._watch.log(told)

    def _validate(self) -> bool:
        """Complete the curve's last point, by rank 0; say no where a rank was told to stop meanwhile, which ends it.

        It may take longer than a pod is given to stop, so that all ranks ask after every batch.
        """
        batches = self._ranks.broadcast_from_main(self._validation.num_batches if self._validation else 0)
        told_to_stop = (self._ranks.any_async(self._stopping.asked)() for _ in range(batches))
        if not self._validation:
            return not any(told_to_stop)

        def look(_: int) -> None:
            if next(told_to_stop):
                self._stopping.raise_now()

        try:
            logits_BC = predict_logits(self.eval_model, self._validation, self._device, look)
        except TerminatedError:
            return False
        correct_B = topk_correct(logits_BC.topk(1).indices, self._validation.labels_B, 1)
        self.curve[-1] = self.curve[-1].model_copy(update={"validation_top1": float(correct_B.float().mean())})
        return True

    def _first_nonfinite_step(self) -> int:
        """Return the first step in which this rank's loss was no number; one that never comes, where there is none."""
        return int(self._bad_step.item()) or self._steps + 1

    def _check_finite(self, bad: int) -> None:
        """Raise SemiscaleError where there is a step whose loss was not finite, and say of which images.

        Of several ranks the first one's is told: the others' break a step later, of weights that are no numbers.
        """
        if bad > self._steps:
            return
        if self._first_nonfinite_step() != bad:
            raise SemiscaleError(
                f"train: {self._name}: step {bad:,}: another rank's loss is no number, as it says itself"
            )
        told = next(told for told in self._recent if told.step == bad)
        uri = storage.join(self._folder, f"not-finite-{bad:09}-{self._ranks.rank}.json")
        storage.write_bytes(uri, json.dumps(told._asdict(), indent=1).encode())
        more = (
            f" and {len(told.keys) - MAX_KEYS_IN_MESSAGE} more (see {uri})"
            if len(told.keys) > MAX_KEYS_IN_MESSAGE
            else ""
        )
        raise SemiscaleError(
            f"train: {self._name}: the loss is {self._bad_loss.item()} after {bad * self._config.batch_size:,} images "
            f"(step {bad:,}, learning rate {told.rate:g}); lower the rate, or look at the batch: "
            f"{', '.join(told.keys[:MAX_KEYS_IN_MESSAGE])}{more}"
        )

    def _save(self, step: int) -> None:
        """Write a checkpoint, from rank 0: all ranks have the same."""
        if not self._ranks.is_main:
            return
        self._check_finite(self._first_nonfinite_step())
        tensors = self.state_dict()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise SemiscaleError(f"train: {self._name}: weights are not finite after step {step:,}; lower the rate")
        self._saved = time.monotonic()
        images = step * self._config.batch_size
        seconds = self._saved - self._started
        assert self._watch
        self._watch.flush()  # first: lines past the newest checkpoint are dropped by who goes on, missing ones stay so
        self._checkpoints.save(
            TrainerProgress(
                step=step, images_processed=images, ranks=self._ranks.count, seconds=seconds, curve=self.curve
            ),
            tensors,
        )
        log_info("train", f"{self._name}: checkpoint after {images:,} images")

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a step changes: weights, running statistics, averages, momenta."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        if self._average:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.model.state_dict().items()}
        momenta = {name: self._optimizer.state[parameter] for name, parameter in self._model.named_parameters()}
        return tensors | {f"momentum.{name}": state["momentum_buffer"] for name, state in momenta.items() if state}

    def _load_latest_checkpoint(self) -> int:
        """Go on from the newest checkpoint; returns the number of steps that are done."""
        found = self._checkpoints.load_latest()
        step = found[0].step if found else 0
        if self._ranks.broadcast_from_main(step) != step:
            raise SemiscaleError("train: the ranks see different checkpoints; is the workdir the same for all of them?")
        if not found:
            return 0
        moment, tensors = found
        for prefix, module in {
            "model.": self._model,
            **({"average.": self.eval_model} if self._average else {}),
        }.items():
            module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
        for name, parameter in self._model.named_parameters():
            if f"momentum.{name}" in tensors:
                buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                self._optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
        self.curve, self.seconds = list(moment.curve), moment.seconds
        self._open = _is_due(step, self._steps, VALIDATION_COUNT) and self.curve[-1].validation_top1 is None
        now = self._ranks.count
        change = "" if moment.ranks == now else f" by {moment.ranks} ranks, now with {now}"
        log_info("train", f"{self._name}: going on after {moment.images_processed:,} images{change}")
        return step


def split_microbatches(images: int, at_most: int) -> list[slice]:
    """Cut a rank's share of a batch into as few parts as there must be, of nearly equal size.

    Parts of `at_most` and a rest would end in a part of one image where a share is one larger than a multiple: batch
    normalisation cannot take it, and the statistics of any small rest are poor ones.
    """
    count = math.ceil(images / at_most)
    return [slice(part * images // count, (part + 1) * images // count) for part in range(count)]


def _is_due(step: int, steps: int, times: int) -> bool:
    """Say whether one of `times` equally spaced events falls on this step; the last step always has one."""
    return step * times // steps > (step - 1) * times // steps
