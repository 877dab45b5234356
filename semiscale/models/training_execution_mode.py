"""How a network runs fastest on a GPU: tried, not assumed.

channels_last can halve the speed of grouped convolutions and double that of plain ones; compiling costs minutes and may
gain a tenth. So both are timed on this card with this network before the training begins.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiscale.models import checkpoint_io
from semiscale.observability.progress import log_info

TIMED_STEPS = 8  # timed of each manner, after as many to warm up
ModelWrapper = Callable[[nn.Module], nn.Module]  # around a network, so that its gradients are averaged over the ranks


@dataclass(frozen=True)
class TrainingExecutionMode:
    """How a network is run: the memory format of its tensors, and whether it is compiled."""

    channels_last: bool = False
    compiled: bool = False

    def set_memory_format(self, model: nn.Module) -> None:
        """Bring a model's weights into the memory format."""
        if self.channels_last:
            model.to(memory_format=checkpoint_io.channels_last_format(model))

    def wrap(self, model: nn.Module, averaging: ModelWrapper) -> nn.Module:
        """Return the network that runs the model in this manner; they share their parameters.

        DistributedDataParallel wraps first and is compiled then, as PyTorch's notes on it ask (docs.pytorch.org, "DDP
        works with TorchDynamo"): the compiler then splits its graphs where the gradients are averaged, so that one
        part is averaged while the next is computed. Compiled first, all would be averaged at the end of the step.
        """
        self.set_memory_format(model)
        network = averaging(model)
        compiled: nn.Module = torch.compile(network) if self.compiled else network  # type: ignore[assignment]
        return compiled


def autotune_training(
    model: nn.Module, images_BCHW: Tensor, steps: int, averaging: ModelWrapper
) -> TrainingExecutionMode:
    """Time the manners on random images of this shape and return the one that makes so many steps end first.

    `averaging` wraps the network as the training does, but waits for nobody: what is timed is split as it will be. The
    model itself is left as it is. Cost: a second copy of it for some seconds, and the minutes of one compilation.
    """
    seconds = {
        TrainingExecutionMode(last): time_step(model, images_BCHW, TrainingExecutionMode(last), averaging)
        for last in (False, True)
    }
    best = min(seconds, key=lambda manner: seconds[manner])
    compiled = TrainingExecutionMode(best.channels_last, compiled=True)
    started = time.monotonic()
    try:
        seconds[compiled] = time_step(model, images_BCHW, compiled, averaging)
    except Exception as error:  # noqa: BLE001 - a compiler fails in every way there is; training goes on without it
        log_info("train", f"torch.compile failed, going on without: {str(error).splitlines()[0]}")
        return best
    spent_s = time.monotonic() - started
    pays = (seconds[best] - seconds[compiled]) * steps > spent_s  # it is spent once more, by the training's own copy
    told = ", ".join(f"{_name(manner)} {took * 1000:.1f} ms" for manner, took in seconds.items())
    chosen = compiled if pays else best
    log_info("train", f"a step of {len(images_BCHW)} images: {told}; taken: {_name(chosen)}")
    return chosen


def time_step(model: nn.Module, images_BCHW: Tensor, manner: TrainingExecutionMode, averaging: ModelWrapper) -> float:
    """Return the seconds of one forward and backward pass in bf16."""
    network = manner.wrap(copy.deepcopy(model).train(), averaging)
    labels_B = torch.zeros(len(images_BCHW), dtype=torch.int64, device=images_BCHW.device)
    started = 0.0
    for step in range(2 * TIMED_STEPS):
        if step == TIMED_STEPS:
            started = _now(images_BCHW)
        with torch.autocast(images_BCHW.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(to_memory_format(images_BCHW, manner)), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]
    return (_now(images_BCHW) - started) / TIMED_STEPS


def to_memory_format(images_BCHW: Tensor, manner: TrainingExecutionMode) -> Tensor:
    """Return the images in the manner's memory format."""
    last = torch.channels_last_3d if images_BCHW.dim() == 5 else torch.channels_last
    return images_BCHW.contiguous(memory_format=last if manner.channels_last else torch.contiguous_format)


def _now(on: Tensor) -> float:
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
    return time.monotonic()


def _name(manner: TrainingExecutionMode) -> str:
    layout = "channels_last" if manner.channels_last else "contiguous"
    return f"{layout}, compiled" if manner.compiled else layout
