"""The teacher on its device: a batch of pixels in, each image's best classes out.

On a GPU one compiled graph in bf16 with an fp32 head, fed from page-locked memory by a stream of its own, its results
fetched one batch later. On a CPU fp32 throughout, every core with a batch of its own, and nothing that could make an
image's scores depend on the others or on the number of cores.

What holds of an image's scores, to the bit, whatever the batch it came in, the number of pods and the order of shards:
on CPUs of one type (the instructions that torch's kernels choose by) and one version of the software they are the same,
and it is tested. On GPUs they are for one type of card, one version of the software and one decision (see decision.py):
batches are of one size, and no algorithm is chosen by timing or adds in changing order. Seen on an H100, with 100
photographs in other batches and other processes. Across types of cards, or CPUs, they differ in the last bits.
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

Best = tuple[Tensor, Tensor]  # labels_BP, scores_BP
CPU_BATCH = 16  # its activations stay near the core
CPU_BATCH_OF_TINY = 128  # images of up to TINY pixels a side: calling the layers costs as much as they do
TINY_RESOLUTION = 64
GPU_BATCH = 256
# Batches that each execution mode is timed on.
WARMUP_BATCHES, TIMED_BATCHES = 1, 4


def top_class_log_odds(logits_BC: Tensor, classes: int) -> Best:
    """Return the `classes` best classes of each image and their log-odds, fp32: x_c - logsumexp of the other logits.

    Monotone in the softmax probability, so it is the paper's ranking (section 3.2), and it still tells images apart
    where the probability has rounded to 1. For the best class the others are summed without it, because subtracting
    it from the sum of all would cancel; for any other the sum is at least twice what is subtracted.
    """
    logits_BC = logits_BC.float()
    best_BP, labels_BP = logits_BC.topk(classes)
    top_B1 = best_BP[:, :1]
    weights_BC = (logits_BC - top_B1).exp()
    others_BP = top_B1 + (weights_BC.sum(1, keepdim=True) - (best_BP - top_B1).exp()).log()
    others_BP[:, 0] = logits_BC.scatter(1, labels_BP[:, :1], -torch.inf).logsumexp(1)
    return labels_BP, best_BP - others_BP


def top_class_mean_log_odds(logits_BVC: Tensor, classes: int) -> Best:
    """Return the best classes of each video by the mean of its clips' softmax (section 5.1), and that mean's log-odds.

    log(mean p / (1 - mean p)) = logsumexp of the clips' log p - logsumexp of their log(1 - p): the number of clips
    cancels, and neither side rounds where a probability is near 0 or 1. A clip's best class is left out of the sum of
    its others, as in `log_odds`.
    """
    logits_BVC = logits_BVC.float()
    log_all_BV1 = logits_BVC.logsumexp(2, keepdim=True)
    best_BV1, labels_BV1 = logits_BVC.max(2, keepdim=True)
    weights_BVC = (logits_BVC - best_BV1).exp()
    others_BVC = best_BV1 + (weights_BVC.sum(2, keepdim=True) - weights_BVC).log()
    others_of_best_BV1 = logits_BVC.scatter(2, labels_BV1, -torch.inf).logsumexp(2, keepdim=True)
    others_BVC = others_BVC.scatter(2, labels_BV1, others_of_best_BV1)
    odds_BC = (logits_BVC - log_all_BV1).logsumexp(1) - (others_BVC - log_all_BV1).logsumexp(1)
    best_BP, labels_BP = odds_BC.topk(classes)
    return labels_BP, best_BP


class ScoringModule(nn.Module):
    """uint8 pixels to the best classes' labels and log-odds: normalising, network and ranking as one graph.

    The network runs in bf16 where asked to, but for its head (networks.float_head) and the ranking.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, kept: int, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._normalize = Normalize(preprocessing, torch.device("cpu"))
        self._preprocessing, self._kept, self._bf16 = preprocessing, kept, bf16
        self.memory_format = DEFAULT_SCORING_MODE.model_memory_format(model)

    def forward(self, images_BHWC: Tensor) -> Best:
        images_BCHW = self._normalize(images_BHWC)
        if self._preprocessing.frames:  # clips_BVCTHW
            images_BCHW = images_BCHW.flatten(0, 1)
        with torch.autocast(images_BHWC.device.type, torch.bfloat16, enabled=self._bf16):
            logits_BC = self.model(images_BCHW.contiguous(memory_format=self.memory_format))
        if self._preprocessing.frames:
            return top_class_mean_log_odds(logits_BC.unflatten(0, images_BHWC.shape[:2]), self._kept)
        return top_class_log_odds(logits_BC, self._kept)

    def set_memory_format(self, mode: ExecutionMode) -> None:
        """Keep weights and activations in the memory format of a mode."""
        self.memory_format = mode.model_memory_format(self.model)
        mode.set_memory_format(self.model)


def time_scoring(scorer: ScoringModule, images_BHWC: Tensor, mode: ExecutionMode) -> float:
    """Return the seconds of one batch. The scorer is left in the memory format of the mode."""
    scorer.set_memory_format(mode)
    network = torch.compile(scorer) if mode.compiled else scorer
    return execution_mode.time_calls(lambda: network(images_BHWC), images_BHWC.device, WARMUP_BATCHES, TIMED_BATCHES)


def autotune(scorer: ScoringModule, images_BHWC: Tensor, on: str) -> ExecutionMode:
    """Choose a mode by timing a batch. Every network that compiles is compiled."""
    return execution_mode.autotune(
        "score", f"a batch of {len(images_BHWC)}", lambda mode: time_scoring(scorer, images_BHWC, mode), on=on
    )


def apply_mode(mode: ExecutionMode, scorer: ScoringModule, images_BHWC: Tensor) -> nn.Module:
    """Return the network as it was decided to run. Raises SemiscaleError where it cannot be compiled here."""
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
    """Return how many images, or videos, make a batch on a device, and how many batches are under way on it."""
    if device.type == "cuda":
        return eval_transforms.eval_batch_size(GPU_BATCH, preprocessing), 2
    images = CPU_BATCH if preprocessing.resolution > TINY_RESOLUTION else CPU_BATCH_OF_TINY
    return eval_transforms.eval_batch_size(images, preprocessing), intra_op_threads() + 1


class CpuScorer:
    """Scores as many batches at once as there are threads, each on one.

    Threads that shared a batch would wait for each other after every layer, the longer the more of them also decode.
    Measured on two idle cores, ResNet-50 at 224: 33 images/s, with both on one batch 18 to 23.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, kept: int) -> None:
        self._scorer = ScoringModule(model, preprocessing, kept, bf16=False).eval()
        self._scorer.set_memory_format(DEFAULT_SCORING_MODE)
        self.batch_size, self.in_flight = batch_size_and_depth(torch.device("cpu"), preprocessing)
        self._pool = ThreadPoolExecutor(intra_op_threads(), "forward", torch.set_num_threads, (1,))

    def submit(self, images_BHWC: Batch) -> Callable[[], Best]:
        """Put a batch in line; the function that is returned waits for the result. Keep the pixels until then."""
        return self._pool.submit(self._best, images_BHWC).result

    @torch.inference_mode()
    def _best(self, images_BHWC: Batch) -> Best:
        best: Best = self._scorer(torch.from_numpy(images_BHWC))
        return best


class GpuScorer:
    """Scores a batch while the next is copied to the device."""

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, kept: int, device: torch.device, folder: str
    ) -> None:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        self._device, self._copies = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        scorer = ScoringModule(model, preprocessing, kept, bf16=True).eval().to(device)
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
        """Put a batch in line; the function that is returned waits for the result.

        The pixels are copied into page-locked memory, which the device fetches from by itself.
        """
        with torch.cuda.stream(self._copies):
            there_BHWC = torch.from_numpy(images_BHWC).pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        there_BHWC.record_stream(computing)
        best = tuple(
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in self._scorer(there_BHWC)
        )
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(computing)

        def result() -> Best:
            done.synchronize()
            return best[0], best[1]

        return result


def make_scorer(
    device: torch.device, model: nn.Module, preprocessing: Preprocessing, kept: int, folder: str
) -> CpuScorer | GpuScorer:
    """Put a model on a device; how it runs on a GPU, the pods that share a folder have in common."""
    if device.type == "cuda":
        return GpuScorer(model, preprocessing, kept, device, folder)
    return CpuScorer(model, preprocessing, kept)
