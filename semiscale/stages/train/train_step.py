"""One optimizer step over the microbatches of a batch."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from semiscale.models import execution_mode
from semiscale.models.execution_mode import DEFAULT_TRAINING_MODE, ExecutionMode
from semiscale.models.normalization import Normalize
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.device_loader import DeviceBatch
from semiscale.stages.train.loss import training_loss
from semiscale.stages.train.train_state import TrainState


class TrainStep:
    """Synchronous SGD on one rank.

    Every rank computes the gradient of its slice of a batch, `device_batch_size` images at a time.
    DistributedDataParallel averages the gradients, and every rank makes the same step. Batch normalization sees the
    images of one microbatch, as in the paper. Its running statistics are those of rank 0.

    The constructor broadcasts the execution mode on a GPU, so every rank must build one.

    Args:
        config: The training.
        state: The tensors that a step changes. A checkpoint must be restored before.
        steps: Steps of the whole training.
        done: Steps that are done already.
        device: Device of the model.
        ranks: This process among those of the training.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        steps: int,
        done: int,
        device: torch.device,
        ranks: DistributedContext,
    ) -> None:
        self._config, self._state, self._steps, self._device, self._ranks = config, state, steps, device, ranks
        self._recipe = config.resolved_recipe
        self._normalize = Normalize(config.preprocessing, device)
        on_gpu = device.type == "cuda"
        self._execution_mode = self._broadcast_execution_mode(done) if on_gpu else DEFAULT_TRAINING_MODE
        if state.ema:
            self._execution_mode.set_memory_format(state.ema.model)
        self._network = self._execution_mode.wrap(state.model, ranks.broadcast_ddp_wrapper())

    def all_reduce_step(self, batch: DeviceBatch, rate: float, step: int) -> Tensor:
        """Make one step of SGD. The gradients are all-reduced, so every rank must call it.

        The gradient is that of the mean loss over the global batch. A microbatch counts by its number of images, so
        ranks and microbatches may differ in size.

        Args:
            batch: This rank's slice of the batch.
            rate: Learning rate.
            step: Number of the step, from 1.

        Returns:
            This rank's share of the mean loss, times the number of ranks: a scalar on the device.
        """
        for group in self._state.optimizer.param_groups:
            group["lr"] = rate
        # Layers such as dropout draw random numbers. Their seed depends on the step, so a resumed training repeats it.
        torch.manual_seed((self._config.seed * self._steps + step) * self._ranks.count + self._ranks.rank)
        self._state.optimizer.zero_grad(set_to_none=True)
        parts = split_microbatches(len(batch.labels_B), self._config.device_batch_size)
        first = self._ranks.batch_slice(self._config.batch_size).start
        total = torch.zeros((), device=self._device)
        for part in parts:
            with self._no_sync() if part != parts[-1] else nullcontext():
                loss = self._loss(batch.images_BHWC[part], batch.labels_B[part], [step, first + part.start])
                share = (part.stop - part.start) * self._ranks.count / self._config.batch_size
                (loss * share).backward()
            total += loss.detach() * share
        self._state.optimizer.step()
        if self._state.ema:
            self._state.ema.update(step, self._state.model)
        return total

    def _loss(self, images_BHWC: Tensor, labels_B: Tensor, position: list[int]) -> Tensor:
        """Return the loss of a microbatch.

        The mixture of images depends on `position` (the step and the offset in the global batch), and not on the rank.
        """
        images_BCHW = self._normalize(images_BHWC)
        seed = [self._config.seed, 3, *position]
        if self._device.type == "cpu":
            return training_loss(self._network, images_BCHW, labels_B, self._recipe, seed)
        with torch.autocast("cuda", torch.bfloat16):
            images_BCHW = self._execution_mode.to_memory_format(images_BCHW)
            return training_loss(self._network, images_BCHW, labels_B, self._recipe, seed)

    def _no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the last microbatch of the batch."""
        if self._ranks.count == 1:
            return nullcontext()
        # A compiled network has the methods of the wrapped one.
        return cast(DistributedDataParallel, self._network).no_sync()

    def _broadcast_execution_mode(self, done: int) -> ExecutionMode:
        """Let rank 0 choose how all ranks run the network, and broadcast its choice.

        Gradients in different memory formats cannot be averaged.
        """
        parts = split_microbatches(
            math.ceil(self._config.batch_size / self._ranks.count), self._config.device_batch_size
        )
        size = parts[-1].stop - parts[-1].start
        images_BCHW = torch.rand(size, *input_shape(self._config), device=self._device)
        averaging = self._ranks.broadcast_ddp_wrapper(of_the_first=True)
        chosen = None
        if self._ranks.is_main:
            chosen = execution_mode.autotune_training(
                self._state.model, images_BCHW, (self._steps - done) * len(parts), averaging
            )
        return cast(ExecutionMode, self._ranks.broadcast_from_main(chosen))


def split_microbatches(images: int, at_most: int) -> list[slice]:
    """Split a rank's slice of a batch into the fewest parts, of nearly equal size.

    Parts of `at_most` and a remainder could end in a part of one image. Batch normalization cannot take one image, and
    the statistics of a small part are poor.

    Args:
        images: Images of the slice.
        at_most: Images of a part, at most.
    """
    count = math.ceil(images / at_most)
    return [slice(part * images // count, (part + 1) * images // count) for part in range(count)]


def input_shape(config: TrainConfig) -> tuple[int, ...]:
    """Return the shape of an image, CHW, or of a clip, CTHW."""
    return (3, *([config.frames] if config.frames else []), config.resolution, config.resolution)
