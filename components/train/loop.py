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

from components.shared import models, networks, storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.predict import PreparedSplit, hits, logits
from components.shared.progress import say
from components.shared.receipts import PackReceipt, PlanReceipt, Point, Preprocessing, load
from components.shared.shards import Columns
from components.shared.splits import LabeledShard, read_packed, read_split
from components.shared.stopping import Stopped, Stopping
from components.train import objective, speed
from components.train.average import Average
from components.train.checkpoints import Checkpoints, Moment
from components.train.config import TrainConfig
from components.train.data import TrainingData
from components.train.feed import DeviceBatch, Normalise, fed
from components.train.ranks import Ranks
from components.train.recipes import Recipe, learning_rate
from components.train.speed import Manner
from components.train.start import starting_model
from components.train.waiting import waiting_of
from components.train.watch import Watch

if TYPE_CHECKING:
    from components.train.augment import Augment

MOMENTUM = 0.9  # He et al. 2016; the paper says synchronous SGD
CURVE_POINTS = 100
VALIDATIONS = 10  # divides CURVE_POINTS, so that each falls on a point of the curve, however many steps there are
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # steps: asking a GPU for the loss waits for it
KEYS_TOLD = 10  # of a batch whose loss is no number; all are in a file


def run(config: TrainConfig, folder: str, ranks: Ranks, stopping: Stopping) -> dict[str, object]:
    """Train, save the checkpoint in `folder`, and return the fields of the receipt, on every rank the same.

    Raises SemiscaleError where the device's memory does not do.
    """
    models.set_up()
    device = models.device()
    if device.type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    with ranks.joined(device.type == "cuda"):
        try:
            fields = _trained(config, folder, ranks, stopping)
        except torch.OutOfMemoryError as error:
            raise SemiscaleError(
                f"train: {str(error).splitlines()[0]} Lower device_batch_size, which is {config.device_batch_size}: "
                "gradients still add up to batch_size"
            ) from None
        return dict(ranks.firsts(fields))


def _trained(config: TrainConfig, folder: str, ranks: Ranks, stopping: Stopping) -> dict[str, object]:
    if config.batch_size < ranks.count:
        raise Refused(f"batch_size: {config.batch_size} images for {ranks.count} ranks; expected one for each at least")
    plan = load(config.plan, PlanReceipt)
    preprocessing = config.preprocessing
    columns = Columns(config.image_column, config.label_column, config.frames > 0)
    augment = _augment(config.numbers, preprocessing)
    data = TrainingData(_shards(config, plan), columns, preprocessing, config.seed, ranks, augment)
    validation = PreparedSplit(plan.validation, columns, preprocessing) if ranks.first else None
    total = config.images_processed + config.epochs * plan.train.samples
    model, source = starting_model(config, plan)
    if 1 in _part_sizes(config, ranks):
        networks.refuse_too_few(model, config.architecture, (1, *_axes(config)))
    training = Training(config, model.to(models.device()), validation, total, ranks)
    training.run(data, folder, stopping)
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
        "checkpoint": models.save(training.result, description, folder) if ranks.first else "",
        "source": source,
        "parameters": sum(parameter.numel() for parameter in training.result.parameters()),
        "classes": plan.classes,
        "preprocessing": preprocessing,
        "images_processed": training.images_processed,
        "samples": data.samples,
        "learning_rate": config.learning_rate,
        "validation_top1": training.curve[-1].validation_top1,
        "curve": training.curve,
        "images_per_s": training.images_processed / training.seconds,
    }


def _part_sizes(config: TrainConfig, ranks: Ranks) -> set[int]:
    """Return how many images are forwarded at a time, by whichever rank."""
    shares = {config.batch_size // ranks.count, math.ceil(config.batch_size / ranks.count)}
    return {part.stop - part.start for share in shares for part in in_parts(share, config.device_batch_size)}


def _axes(config: TrainConfig) -> tuple[int, ...]:
    """Return the axes of an image, CHW, or of a clip, CTHW."""
    return (3, *([config.frames] if config.frames else []), config.resolution, config.resolution)


def _augment(recipe: Recipe, preprocessing: Preprocessing) -> "Augment | None":
    if not recipe.trivial_augment:
        return None
    from components.train.augment import Augment  # it imports torchvision, eight CPU-seconds: for those who use it

    return Augment(preprocessing, recipe.erasing)


def _shards(config: TrainConfig, plan: PlanReceipt) -> list[LabeledShard]:
    if config.numbers.learns_from == "labeled":
        return read_split(plan.train)
    if not config.packed:
        raise Refused(f"train: recipe {config.recipe} needs --packed, the receipt of the pack stage")
    return read_packed(load(config.packed, PackReceipt).shards)


class _Told(NamedTuple):
    """A step, for whom it may concern when its loss turns out to be no number."""

    step: int
    rate: float
    keys: list[str]


class Training:
    """One rank's part of the training of one model: its optimizer, its schedule, its curve.

    Synchronous SGD: every rank forwards and backwards its part of each batch, `device_batch_size` images at a time, the
    gradients are averaged over all (DistributedDataParallel), and every rank makes the same step. Batch normalisation
    sees the images that a device forwards at a time, as in the paper; its running statistics are rank 0's.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, validation: PreparedSplit | None, total: int, ranks: Ranks
    ) -> None:
        self._config, self._model, self._validation, self._ranks = config, model, validation, ranks
        self._recipe, self._device = config.numbers, models.device()
        self._steps = max(math.ceil(total / config.batch_size), 1)
        self._average = Average(model, self._recipe, self._steps) if self._recipe.average else None
        self._normalise = Normalise(config.preprocessing, self._device)
        self._name = f"{config.recipe} {config.architecture}, learning rate {config.learning_rate:g}"
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self._device)
        self._bad_loss = torch.zeros((), device=self._device)
        self._recent: deque[_Told] = deque(maxlen=max(CHECK_EVERY.values()))
        self._manner = Manner()
        self._waiting = waiting_of(self._device)
        self._open = False  # whether the curve's last point lacks its validation, which was stopped
        self.curve: list[Point] = []
        self.seconds = 0.0

    @property
    def result(self) -> nn.Module:
        """The model that is measured and kept: the averaged one, where the recipe averages."""
        return self._average.model if self._average else self._model

    @property
    def images_processed(self) -> int:
        """What the whole training processes: the last batch is a full one, whatever was asked for."""
        return self._steps * self._config.batch_size

    def run(self, data: TrainingData, folder: str, stopping: Stopping) -> None:
        """Train on batches of a fixed size until all images are processed, from the newest checkpoint there is.

        Raises Stopped on SIGTERM, after a checkpoint, and SemiscaleError where the loss stops being a number.
        """
        self._folder, self._checkpoints, self._stopping = folder, Checkpoints(folder), stopping
        size = self._config.batch_size
        say("train", f"{self._name}: {self._steps:,} steps of {size:,} images, on {data.samples:,} samples")
        self._optimizer = self._sgd()
        done = self._resumed()
        batches = fed(data, size, self._steps, done, self._device)
        self._network = self._distributed(done)
        self._watch = Watch(folder, self._config.recipe, self._steps * size, done * size) if self._ranks.first else None
        self._started = self._saved = time.monotonic() - self.seconds
        self._saved = time.monotonic()
        self._model.train()
        with stopping.held():
            if self._open:
                self._close(done)
            if self._open:
                stopping.stop()
            for step in range(done + 1, self._steps + 1):
                told_to_stop = self._ranks.any(stopping.asked)
                self._one(step, batches)
                if told_to_stop() or self._open:
                    self._save(step)
                    self._ranks.firsts(step)  # to the end: where one rank is gone, torchrun kills the others soon
                    stopping.stop()
                if self._ranks.first and time.monotonic() - self._saved >= 60 * self._config.checkpoint_minutes:
                    self._save(step)
            if done < self._steps:
                self._save(self._steps)
        self.seconds = time.monotonic() - self._started
        if self._watch:
            self._watch.flush()
            say("train", f"{self._name}: validation top-1 {self.curve[-1].validation_top1:.4f}")

    def _one(self, step: int, batches: Iterator[DeviceBatch]) -> None:
        """Make one step, and tell of it what is due."""
        size = self._config.batch_size
        batch = self._waiting.next(batches)
        rate = learning_rate(self._recipe, self._config.learning_rate, size, (step - 1) * size, self._steps * size)
        loss = self._step(batch, rate, step)
        self._waiting.stepped()
        if step % CHECK_EVERY[self._device.type] == 0 or _due(step, self._steps, CURVE_POINTS):
            self._refuse_no_number(self._ranks.least(self._first_bad()))
        if self._watch:
            self._watch.step(size, rate, loss.item, self._waiting.settled_s())
        if _due(step, self._steps, CURVE_POINTS):
            self._record(step, rate, self._ranks.mean(loss).item())

    def _step(self, batch: DeviceBatch, rate: float, step: int) -> Tensor:
        """Make one step of SGD; returns the mean loss of this rank's images, on the device.

        The gradient is that of the mean over the whole batch, in however many parts it is computed: a part counts by
        its images, and the ranks' gradients are averaged, however many images and parts each rank has.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Of layers that draw at random, such as dropout: a function of the step, so that it can be repeated.
        torch.manual_seed((self._config.seed * self._steps + step) * self._ranks.count + self._ranks.rank)
        self._optimizer.zero_grad(set_to_none=True)
        parts = in_parts(len(batch.labels_B), self._config.device_batch_size)
        first = self._ranks.share(self._config.batch_size).start
        total = torch.zeros((), device=self._device)
        for part in parts:
            with self._alone() if part != parts[-1] else nullcontext():
                loss = self._loss(batch.images_BHWC[part], batch.labels_B[part], [step, first + part.start])
                share = (part.stop - part.start) * self._ranks.count / self._config.batch_size
                (loss * share).backward()
            total += loss.detach() * share
        self._optimizer.step()
        if self._average:
            self._average.follow(step, self._model)
        fresh = (self._bad_step == 0) & ~total.isfinite()
        self._bad_step = torch.where(fresh, step, self._bad_step)
        self._bad_loss = torch.where(fresh, total, self._bad_loss)
        self._recent.append(_Told(step, rate, batch.keys))
        return total

    def _loss(self, images_BHWC: Tensor, labels_B: Tensor, place: list[int]) -> Tensor:
        """Return the loss of a part by its place, step and position in the global batch: whichever rank has it, it is
        mixed alike.
        """
        images_BCHW = self._normalise(images_BHWC)
        seed = [self._config.seed, 3, *place]
        if self._device.type == "cpu":
            return objective.loss(self._network, images_BCHW, labels_B, self._recipe, seed)
        with torch.autocast("cuda", torch.bfloat16):
            images_BCHW = speed.laid_out(images_BCHW, self._manner)
            return objective.loss(self._network, images_BCHW, labels_B, self._recipe, seed)

    def _alone(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the last part of the batch."""
        if self._ranks.count == 1:
            return nullcontext()
        return cast(DistributedDataParallel, self._network).no_sync()  # or what compiling made of one

    def _sgd(self) -> torch.optim.SGD:
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

    def _distributed(self, done: int) -> nn.Module:
        """Return the network as it is run on this device, its gradients averaged over the ranks."""
        if self._device.type == "cuda":
            self._manner = self._fastest(done)
        if self._average:
            self._manner.arrange(self._average.model)
        return self._manner.apply(self._model, self._ranks.averaging())

    def _fastest(self, done: int) -> Manner:
        """Let rank 0 say how all run the network: gradients in different memory formats could not be averaged."""
        parts = in_parts(math.ceil(self._config.batch_size / self._ranks.count), self._config.device_batch_size)
        size = parts[-1].stop - parts[-1].start
        images_BCHW = torch.rand(size, *_axes(self._config), device=self._device)
        averaging = self._ranks.averaging(of_the_first=True)
        found = None
        if self._ranks.first:
            found = speed.fastest(self._model, images_BCHW, (self._steps - done) * len(parts), averaging)
        return cast(Manner, self._ranks.firsts(found))

    def _record(self, step: int, rate: float, loss: float) -> None:
        images = step * self._config.batch_size
        self.curve.append(Point(images_processed=images, learning_rate=rate, loss=loss))
        self._close(step)

    def _close(self, step: int) -> None:
        """Validate the model of the curve's last point, where that is due, and tell of the point.

        The point stays open, and is not told, where the validation was stopped: then it is in a checkpoint of this very
        step, and who goes on closes it first.
        """
        self._open = _due(step, self._steps, VALIDATIONS) and not self._validated()
        if self._watch and not self._open:
            told = self.curve[-1].model_dump(exclude={"images_processed"}, exclude_none=True)
            self._watch.record(told)

    def _validated(self) -> bool:
        """Complete the curve's last point, by rank 0; say no where a rank was told to stop meanwhile, which ends it.

        It may take longer than a pod is given to stop, so that all ranks ask after every batch.
        """
        batches = self._ranks.firsts(self._validation.count if self._validation else 0)
        told_to_stop = (self._ranks.any(self._stopping.asked)() for _ in range(batches))
        if not self._validation:
            return not any(told_to_stop)

        def look(_: int) -> None:
            if next(told_to_stop):
                self._stopping.stop()

        try:
            found = hits(logits(self.result, self._validation, self._device, look), self._validation.labels_B, 1)
        except Stopped:
            return False
        self.curve[-1] = self.curve[-1].model_copy(update={"validation_top1": float(found.float().mean())})
        return True

    def _first_bad(self) -> int:
        """Return the first step in which this rank's loss was no number; one that never comes, where there is none."""
        return int(self._bad_step.item()) or self._steps + 1

    def _refuse_no_number(self, bad: int) -> None:
        """Raise SemiscaleError where there is a step whose loss was not finite, and say of which images.

        Of several ranks the first one's is told: the others' break a step later, of weights that are no numbers.
        """
        if bad > self._steps:
            return
        if self._first_bad() != bad:
            raise SemiscaleError(
                f"train: {self._name}: step {bad:,}: another rank's loss is no number, as it says itself"
            )
        told = next(told for told in self._recent if told.step == bad)
        uri = storage.join(self._folder, f"not-finite-{bad:09}-{self._ranks.rank}.json")
        storage.write(uri, json.dumps(told._asdict(), indent=1).encode())
        more = f" and {len(told.keys) - KEYS_TOLD} more (see {uri})" if len(told.keys) > KEYS_TOLD else ""
        raise SemiscaleError(
            f"train: {self._name}: the loss is {self._bad_loss.item()} after {bad * self._config.batch_size:,} images "
            f"(step {bad:,}, learning rate {told.rate:g}); lower the rate, or look at the batch: "
            f"{', '.join(told.keys[:KEYS_TOLD])}{more}"
        )

    def _save(self, step: int) -> None:
        """Write a checkpoint, from rank 0: all ranks have the same."""
        if not self._ranks.first:
            return
        self._refuse_no_number(self._first_bad())
        tensors = self._tensors()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise SemiscaleError(f"train: {self._name}: weights are not finite after step {step:,}; lower the rate")
        self._saved = time.monotonic()
        images = step * self._config.batch_size
        seconds = self._saved - self._started
        assert self._watch
        self._watch.flush()  # first: lines past the newest checkpoint are dropped by who goes on, missing ones stay so
        self._checkpoints.save(
            Moment(step=step, images_processed=images, ranks=self._ranks.count, seconds=seconds, curve=self.curve),
            tensors,
        )
        say("train", f"{self._name}: checkpoint after {images:,} images")

    def _tensors(self) -> dict[str, Tensor]:
        """Return all that a step changes: weights, running statistics, averages, momenta."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        if self._average:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.model.state_dict().items()}
        momenta = {name: self._optimizer.state[parameter] for name, parameter in self._model.named_parameters()}
        return tensors | {f"momentum.{name}": state["momentum_buffer"] for name, state in momenta.items() if state}

    def _resumed(self) -> int:
        """Go on from the newest checkpoint; returns the number of steps that are done."""
        found = self._checkpoints.newest()
        step = found[0].step if found else 0
        if self._ranks.firsts(step) != step:
            raise SemiscaleError("train: the ranks see different checkpoints; is the workdir the same for all of them?")
        if not found:
            return 0
        moment, tensors = found
        for prefix, module in {"model.": self._model, **({"average.": self.result} if self._average else {})}.items():
            module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
        for name, parameter in self._model.named_parameters():
            if f"momentum.{name}" in tensors:
                buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                self._optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
        self.curve, self.seconds = list(moment.curve), moment.seconds
        self._open = _due(step, self._steps, VALIDATIONS) and self.curve[-1].validation_top1 is None
        now = self._ranks.count
        change = "" if moment.ranks == now else f" by {moment.ranks} ranks, now with {now}"
        say("train", f"{self._name}: going on after {moment.images_processed:,} images{change}")
        return step


def in_parts(images: int, at_most: int) -> list[slice]:
    """Cut a rank's share of a batch into as few parts as there must be, of nearly equal size.

    Parts of `at_most` and a rest would end in a part of one image where a share is one larger than a multiple: batch
    normalisation cannot take it, and the statistics of any small rest are poor ones.
    """
    count = math.ceil(images / at_most)
    return [slice(part * images // count, (part + 1) * images // count) for part in range(count)]


def _due(step: int, steps: int, times: int) -> bool:
    """Say whether one of `times` equally spaced events falls on this step; the last step always has one."""
    return step * times // steps > (step - 1) * times // steps
