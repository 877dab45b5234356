"""Choose a network's memory format on a GPU, and whether it is compiled.

channels_last can halve the speed of grouped convolutions and double that of plain ones. Compilation costs minutes and
may gain a tenth. Both are timed on the card with the network, by training and by scoring alike.

Memory formats and compiled graphs add in different orders. Pods that each chose a mode would write scores whose last
bits differ. The first scoring pod therefore stores its mode, and all other pods follow it.
"""

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiscale import storage
from semiscale.observability.progress import log_info
from semiscale.storage.documents import StrictDocument

# Values of `ExecutionMode.layout`. They are stored in `decision.json`.
CHANNELS_LAST, CONTIGUOUS = 0, 1

WARMUP_TRAINING_STEPS = TIMED_TRAINING_STEPS = 8

# Wraps a network so that its gradients are averaged over the ranks.
ModelWrapper = Callable[[nn.Module], nn.Module]


class ExecutionMode(StrictDocument):
    """The way a network runs. Scoring stores it as `decision.json`.

    Attributes:
        layout: `CHANNELS_LAST` or `CONTIGUOUS`.
        compiled: Whether the network runs through `torch.compile`.
        on: Card and software that the mode was chosen on, empty if it was not timed.
    """

    layout: int
    compiled: bool
    on: str

    def memory_format(self, axes: int) -> torch.memory_format:
        """Return the memory format of clips (5 axes) or images (4 axes)."""
        if self.layout == CONTIGUOUS:
            return torch.contiguous_format
        return torch.channels_last_3d if axes == 5 else torch.channels_last

    def model_memory_format(self, model: nn.Module) -> torch.memory_format:
        """Return the memory format of a network's activations and weights."""
        takes_clips = any(parameter.dim() == 5 for parameter in model.parameters())
        return self.memory_format(5 if takes_clips else 4)

    def set_memory_format(self, model: nn.Module) -> None:
        """Convert the weights of a model in place."""
        model.to(memory_format=self.model_memory_format(model))

    def to_memory_format(self, images_BCHW: Tensor) -> Tensor:
        """Return the images, or clips, in the memory format of the mode."""
        return images_BCHW.contiguous(memory_format=self.memory_format(images_BCHW.dim()))

    def wrap(self, model: nn.Module, wrap_ddp: ModelWrapper) -> nn.Module:
        """Return the network that runs the model in this mode.

        Both share their parameters.

        DistributedDataParallel wraps the model before it is compiled, as PyTorch's notes on it ask (docs.pytorch.org,
        "DDP works with TorchDynamo"). The compiler then splits its graphs at the gradient buckets, and one bucket is
        averaged while the next is computed. In the other order all buckets would be averaged at the end of the step.

        Args:
            model: Model whose weights are converted in place.
            wrap_ddp: Wraps the network so that its gradients are averaged over the ranks.
        """
        self.set_memory_format(model)
        network = wrap_ddp(model)
        compiled: nn.Module = torch.compile(network) if self.compiled else network  # type: ignore[assignment]
        return compiled

    def describe(self) -> str:
        """Return the name of the mode for the log."""
        layout = "contiguous" if self.layout == CONTIGUOUS else "channels_last"
        return f"{layout}, compiled" if self.compiled else layout


# The mode of training on a CPU.
DEFAULT_TRAINING_MODE = ExecutionMode(layout=CONTIGUOUS, compiled=False, on="")
# The mode of scoring on a CPU.
DEFAULT_SCORING_MODE = ExecutionMode(layout=CHANNELS_LAST, compiled=False, on="")


def autotune(
    stage: str, batch: str, time_step: Callable[[ExecutionMode], float], steps: float = math.inf, on: str = ""
) -> ExecutionMode:
    """Time both memory formats, compile the network in the faster one, and choose.

    Args:
        stage: Name of the stage in the log.
        batch: Description of a step in the log, such as `a batch of 256 images`.
        time_step: Runs the network in a mode and returns the seconds of one step. It may raise for a compiled network.
        steps: Number of steps that follow. Compilation must save its own duration in them. With infinitely many steps
            every network that compiles is compiled.
        on: Card and software that the mode is chosen on.

    Returns:
        The mode for all steps that follow.
    """
    seconds = {mode: time_step(mode) for mode in (_mode(layout, on) for layout in (CONTIGUOUS, CHANNELS_LAST))}
    best = min(seconds, key=lambda mode: seconds[mode])
    compiled = best.model_copy(update={"compiled": True})
    started = time.monotonic()
    try:
        seconds[compiled] = time_step(compiled)
    # A compiler may raise any error, for example if the image has no C compiler. The network runs without it.
    except Exception as error:  # noqa: BLE001
        log_info(stage, f"torch.compile failed, the network runs slower: {first_line(error)}")
        return best
    # The stage compiles its own copy of the network, so the duration is spent once more.
    compile_s = time.monotonic() - started
    is_compiled = math.isinf(steps) or (seconds[best] - seconds[compiled]) * steps > compile_s
    chosen = compiled if is_compiled else best
    timings = ", ".join(f"{mode.describe()} {step_s * 1000:.1f} ms" for mode, step_s in seconds.items())
    log_info(stage, f"{batch}: {timings}; chosen: {chosen.describe()}")
    return chosen


def autotune_training(
    model: nn.Module, images_BCHW: Tensor, steps: int, wrap_ddp: ModelWrapper, on: str = ""
) -> ExecutionMode:
    """Return the mode in which a training ends first. The model is left as it is.

    Cost: a second copy of the model for some seconds, and the minutes of one compilation.

    Args:
        model: Model to train.
        images_BCHW: Random images, or clips, of the shape that a rank forwards at a time.
        steps: Number of forward and backward passes that follow.
        wrap_ddp: Wraps the network as the training does, but over this rank alone. The timed network is then split
            into the same graphs, and no rank waits for another.
        on: Card and software that the mode is chosen on.
    """
    return autotune(
        "train",
        f"a step of {len(images_BCHW)} images",
        lambda mode: time_training_step(model, images_BCHW, mode, wrap_ddp),
        steps,
        on,
    )


def time_training_step(model: nn.Module, images_BCHW: Tensor, mode: ExecutionMode, wrap_ddp: ModelWrapper) -> float:
    """Return the seconds of a forward and backward pass in bf16.

    The pass runs on a copy of the model.

    Args:
        model: Model that is copied.
        images_BCHW: Images, or clips, of the shape that a rank forwards at a time.
        mode: Mode that the copy runs in.
        wrap_ddp: Wraps the copy so that its gradients are averaged.
    """
    network = mode.wrap(copy.deepcopy(model).train(), wrap_ddp)
    labels_B = torch.zeros(len(images_BCHW), dtype=torch.int64, device=images_BCHW.device)

    def step() -> None:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(mode.to_memory_format(images_BCHW)), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]

    return time_calls(step, images_BCHW.device, WARMUP_TRAINING_STEPS, TIMED_TRAINING_STEPS)


def time_calls(call: Callable[[], object], device: torch.device, warmup: int, timed: int) -> float:
    """Return the mean seconds of a call, without those that warm up.

    Args:
        call: Function that launches work on the device.
        device: Device that the work is done on. It is synchronized before and after the timed calls.
        warmup: Number of calls that are not timed.
        timed: Number of calls that are timed.
    """
    for _ in range(warmup):
        call()
    _synchronize(device)
    started = time.monotonic()
    for _ in range(timed):
        call()
    _synchronize(device)
    return (time.monotonic() - started) / timed


def load_or_decide(folder: str, on: str, decide: Callable[[], ExecutionMode]) -> ExecutionMode:
    """Load the mode of a score folder, or decide and store it.

    The first writer wins if several pods decide at the same time. The mode also binds pods that score a grown pool
    later. A line of the log warns if it was chosen on another card or software: the last bits of scores then differ.

    Args:
        folder: URI of the score folder.
        on: Card and software of this pod.
        decide: Chooses a mode by timing.
    """
    uri = storage.join(folder, "decision.json")
    stored = storage.read_or_none(uri)
    if stored is None:
        storage.write_bytes(uri, decide().model_dump_json().encode(), if_absent=True)
        stored = storage.read_bytes(uri)
    mode = ExecutionMode.model_validate_json(stored)
    if mode.on != on:
        log_info(
            "score", f"this pod has {on}, but {mode.on} scored before it: equal images may differ in the last bits"
        )
    return mode


def _mode(layout: int, on: str) -> ExecutionMode:
    return ExecutionMode(layout=layout, compiled=False, on=on)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
