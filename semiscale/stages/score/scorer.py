"""Run the teacher on its device, and return the best classes of each image.

On a GPU the network is one graph in bf16 with an fp32 head. It reads page-locked memory by a stream of its own, and
results are fetched one batch later. On a CPU everything is fp32, and each core has a batch of its own.

The scores of an image are the same to the bit, whatever its batch, the number of pods and the order of shards:

* On CPUs this holds for one type of CPU (torch chooses its kernels by the instruction set) and one version of the
  software. It does not depend on the number of cores. Tests check it.
* On GPUs it holds for one type of card, one version of the software and one execution mode. All batches have the same
  size, and no algorithm is chosen by timing or adds in a changing order. It was seen on an H100, with 100 photographs
  in other batches and other processes.

Between types of cards or CPUs the last bits differ.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from semiscale.common.cpu import intra_op_threads
from semiscale.common.errors import SemiscaleError
from semiscale.data import eval_transforms
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch
from semiscale.models import execution_mode
from semiscale.models.execution_mode import DEFAULT_SCORING_MODE, ExecutionMode, load_or_decide
from semiscale.models.normalization import Normalize

# labels_BP and scores_BP.
Best = tuple[Tensor, Tensor]
# The activations of so few images stay in the caches of a core.
CPU_BATCH = 16
# For images of up to TINY_RESOLUTION pixels a side, calling a layer costs as much as its work.
CPU_BATCH_OF_TINY = 128
TINY_RESOLUTION = 64
GPU_BATCH = 256
# Batches that each execution mode is timed on.
WARMUP_BATCHES, TIMED_BATCHES = 1, 4


def top_class_log_odds(logits_BC: Tensor, classes: int) -> Best:
    """Return the best classes of each image and their log-odds in fp32.

    The log-odds of class c are x_c - logsumexp of the other logits. They are monotone in the softmax probability, so
    they give the ranking of the paper (section 3.2). They still distinguish images whose probability rounds to 1.

    Args:
        logits_BC: Logits of a batch.
        classes: Number of classes to return.

    Returns:
        labels_BP and scores_BP, best first.
    """
    # log sum_{j != c} exp(x_j) = x_max + log(sum_j exp(x_j - x_max) - exp(x_c - x_max)). For c other than the best
    # class, the sum is at least twice the term that is subtracted, so nothing cancels.
    logits_BC = logits_BC.float()
    best_BP, labels_BP = logits_BC.topk(classes)
    top_B1 = best_BP[:, :1]
    weights_BC = (logits_BC - top_B1).exp()
    others_BP = top_B1 + (weights_BC.sum(1, keepdim=True) - (best_BP - top_B1).exp()).log()
    # For the best class the subtraction would cancel. Its logit is left out of the sum instead.
    others_BP[:, 0] = logits_BC.scatter(1, labels_BP[:, :1], -torch.inf).logsumexp(1)
    return labels_BP, best_BP - others_BP


def top_class_mean_log_odds(logits_BVC: Tensor, classes: int) -> Best:
    """Return the best classes of each video and their log-odds in fp32.

    Classes are ranked by the mean softmax of the video's clips (section 5.1 of the paper). The log-odds of the mean are

        log(mean p / (1 - mean p)) = logsumexp of the clips' log p - logsumexp of their log(1 - p).

    The number of clips cancels, and neither side rounds if a probability is near 0 or 1.

    Args:
        logits_BVC: Logits of the clips of each video.
        classes: Number of classes to return.

    Returns:
        labels_BP and scores_BP, best first.
    """
    logits_BVC = logits_BVC.float()
    log_all_BV1 = logits_BVC.logsumexp(2, keepdim=True)
    best_BV1, labels_BV1 = logits_BVC.max(2, keepdim=True)
    weights_BVC = (logits_BVC - best_BV1).exp()
    others_BVC = best_BV1 + (weights_BVC.sum(2, keepdim=True) - weights_BVC).log()
    # The best class of a clip is left out of the sum, as in `top_class_log_odds`.
    others_of_best_BV1 = logits_BVC.scatter(2, labels_BV1, -torch.inf).logsumexp(2, keepdim=True)
    others_BVC = others_BVC.scatter(2, labels_BV1, others_of_best_BV1)
    odds_BC = (logits_BVC - log_all_BV1).logsumexp(1) - (others_BVC - log_all_BV1).logsumexp(1)
    best_BP, labels_BP = odds_BC.topk(classes)
    return labels_BP, best_BP


class ScoringModule(nn.Module):
    """Normalizes uint8 pixels, runs the network and ranks the classes, in one graph.

    Args:
        model: Teacher, whose head runs in fp32 (`networks.run_head_in_fp32`).
        preprocessing: Normalization, and the number of frames of a clip.
        num_kept: Number of best classes to return.
        bf16: Whether the network runs in bf16. The head and the ranking never do.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, num_kept: int, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._normalize = Normalize(preprocessing, torch.device("cpu"))
        self._preprocessing, self._num_kept, self._bf16 = preprocessing, num_kept, bf16
        self.memory_format = DEFAULT_SCORING_MODE.model_memory_format(model)

    def forward(self, images_BHWC: Tensor) -> Best:
        images_BCHW = self._normalize(images_BHWC)
        if self._preprocessing.frames:
            # clips_BVCTHW become one batch of clips.
            images_BCHW = images_BCHW.flatten(0, 1)
        with torch.autocast(images_BHWC.device.type, torch.bfloat16, enabled=self._bf16):
            logits_BC = self.model(images_BCHW.contiguous(memory_format=self.memory_format))
        if self._preprocessing.frames:
            return top_class_mean_log_odds(logits_BC.unflatten(0, images_BHWC.shape[:2]), self._num_kept)
        return top_class_log_odds(logits_BC, self._num_kept)

    def set_memory_format(self, mode: ExecutionMode) -> None:
        """Convert the weights to the memory format of a mode, and use it for activations."""
        self.memory_format = mode.model_memory_format(self.model)
        mode.set_memory_format(self.model)


def time_scoring(scorer: ScoringModule, images_BHWC: Tensor, mode: ExecutionMode) -> float:
    """Return the seconds of one batch in an execution mode.

    The scorer is left in the memory format of the mode.

    Args:
        scorer: Module that is timed.
        images_BHWC: Pixels of a batch.
        mode: Execution mode.
    """
    scorer.set_memory_format(mode)
    network = torch.compile(scorer) if mode.compiled else scorer
    return execution_mode.time_calls(lambda: network(images_BHWC), images_BHWC.device, WARMUP_BATCHES, TIMED_BATCHES)


def autotune(scorer: ScoringModule, images_BHWC: Tensor, on: str) -> ExecutionMode:
    """Choose an execution mode by timing a batch.

    Every network that compiles is compiled.

    Args:
        scorer: Module that is timed.
        images_BHWC: Pixels of a batch.
        on: Card and software that the mode is chosen on.
    """
    return execution_mode.autotune(
        "score", f"a batch of {len(images_BHWC)}", lambda mode: time_scoring(scorer, images_BHWC, mode), on=on
    )


def apply_mode(mode: ExecutionMode, scorer: ScoringModule, images_BHWC: Tensor) -> nn.Module:
    """Return the network that runs in an execution mode.

    Args:
        mode: The mode of the score folder.
        scorer: Module that runs. Its weights are converted in place.
        images_BHWC: Pixels of a batch, which the compiled network is tried with.

    Raises:
        SemiscaleError: The mode is compiled, and this pod cannot compile the network.
    """
    scorer.set_memory_format(mode)
    if not mode.compiled:
        return scorer
    network: nn.Module = torch.compile(scorer)  # type: ignore[assignment]
    try:
        network(images_BHWC)
    # A compiler may raise any error, for example if the image has no C compiler.
    except Exception as error:
        raise SemiscaleError(
            "SEMI-E275",
            f"this pod: It cannot compile the network: {execution_mode.first_line(error)}. The other pods can. Run all "
            "pods in one image.",
        ) from error
    return network


def batch_size_and_depth(device: torch.device, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the number of images or videos in a batch, and of batches in flight.

    Args:
        device: Device of the network.
        preprocessing: Resolution and number of frames.
    """
    if device.type == "cuda":
        return eval_transforms.eval_batch_size(GPU_BATCH, preprocessing), 2
    images = CPU_BATCH if preprocessing.resolution > TINY_RESOLUTION else CPU_BATCH_OF_TINY
    return eval_transforms.eval_batch_size(images, preprocessing), intra_op_threads() + 1


class CpuScorer:
    """Scores several batches at the same time, each on one thread.

    Threads that share a batch wait for each other after every layer, and longer if they also decode. Measured on two
    idle cores with ResNet-50 at 224 pixels: 33 images/s, and 18 to 23 with both threads on one batch.

    Args:
        model: Teacher.
        preprocessing: Resolution, normalization and number of frames.
        num_kept: Number of best classes to return.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, num_kept: int) -> None:
        self._scorer = ScoringModule(model, preprocessing, num_kept, bf16=False).eval()
        self._scorer.set_memory_format(DEFAULT_SCORING_MODE)
        self.batch_size, self.in_flight = batch_size_and_depth(torch.device("cpu"), preprocessing)
        self._pool = ThreadPoolExecutor(intra_op_threads(), "forward", torch.set_num_threads, (1,))

    def submit(self, images_BHWC: Batch) -> Callable[[], Best]:
        """Queue a batch, and return a function that waits for its result.

        Args:
            images_BHWC: Pixels of a batch. They must not change before the result is there.
        """
        return self._pool.submit(self._best, images_BHWC).result

    @torch.inference_mode()
    def _best(self, images_BHWC: Batch) -> Best:
        best: Best = self._scorer(torch.from_numpy(images_BHWC))
        return best


class GpuScorer:
    """Scores a batch on a GPU while the next one is copied to it.

    Args:
        model: Teacher.
        preprocessing: Resolution, normalization and number of frames.
        num_kept: Number of best classes to return.
        device: The GPU.
        folder: URI of the score folder. The pods that share it run the network in the same execution mode.

    Raises:
        SemiscaleError: The other pods run a compiled network, and this pod cannot compile it.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, num_kept: int, device: torch.device, folder: str
    ) -> None:
        # cuDNN must not choose algorithms by timing, or its sums would differ between processes.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        self._device, self._copy_stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        scorer = ScoringModule(model, preprocessing, num_kept, bf16=True).eval().to(device)
        self.batch_size, self.in_flight = batch_size_and_depth(device, preprocessing)
        blank_BHWC = torch.zeros(
            (self.batch_size, *eval_transforms.eval_view_shape(preprocessing)), dtype=torch.uint8, device=device
        )
        with torch.inference_mode():
            card = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
            mode = load_or_decide(folder, card, lambda: autotune(scorer, blank_BHWC, card))
            self._scorer = apply_mode(mode, scorer, blank_BHWC)

    @torch.inference_mode()
    def submit(self, images_BHWC: Batch) -> Callable[[], Best]:
        """Queue a batch, and return a function that waits for its result.

        Args:
            images_BHWC: Pixels of a batch. They are copied before this returns.
        """
        # The device copies from page-locked memory while it computes another batch.
        with torch.cuda.stream(self._copy_stream):
            device_BHWC = torch.from_numpy(images_BHWC).pin_memory().to(self._device, non_blocking=True)
        # The computation starts after the copy. `record_stream` keeps the allocator from reusing the memory of this
        # copy before the batch is computed.
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_stream(self._copy_stream)
        device_BHWC.record_stream(compute_stream)
        best = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in self._scorer(device_BHWC)
        )
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(compute_stream)

        def result() -> Best:
            done.synchronize()
            return best[0], best[1]

        return result


def make_scorer(
    device: torch.device, model: nn.Module, preprocessing: Preprocessing, num_kept: int, folder: str
) -> CpuScorer | GpuScorer:
    """Put a model on a device, and return the scorer that suits it.

    Args:
        device: Device of the network.
        model: Teacher.
        preprocessing: Resolution, normalization and number of frames.
        num_kept: Number of best classes to return.
        folder: URI of the score folder. The pods that share it run the network in the same execution mode.
    """
    if device.type == "cuda":
        return GpuScorer(model, preprocessing, num_kept, device, folder)
    return CpuScorer(model, preprocessing, num_kept)
