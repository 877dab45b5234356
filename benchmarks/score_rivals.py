"""Score the pool as a user's script would: with a DataLoader, and with Ray Data.

Both run the same network on the same tars. They have torchvision's decoder and resize, uint8 batches, and as many
workers as cores.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.score_workload import CLASSES_PER_IMAGE, CORES, Case, Workload, jpeg_members
from semiscale.data.transforms import Batch
from semiscale.models import checkpoint_io
from semiscale.models.execution_mode import DEFAULT_SCORING_MODE
from semiscale.stages.score import scorer as scoring
from semiscale.stages.score.scorer import Best

BATCH_SIZE = 64 if not torch.cuda.is_available() else 256
# A DataLoader worker takes blocks of this many neighbouring images, so that its batches are full.
IMAGES_PER_BLOCK = 64
# A contestant's run returns the images that it has scored, and the seconds of its start-up that do not count.
Run = Callable[[], tuple[int, float]]


def prepare_dataloader(workload: Workload) -> Run:
    """Prepare a script with torch's DataLoader.

    Worker processes read, decode and batch. The main process scores.
    """
    case = workload.case
    score_batch = load_blocking_scorer(workload.checkpoint, case)
    # Libraries plan their kernels at the first batch, which is not timed.
    score_batch(np.zeros((BATCH_SIZE, case.resolution, case.resolution, 3), np.uint8))

    def run() -> tuple[int, float]:
        loader = DataLoader(
            TarImages(workload.tars, case), batch_size=BATCH_SIZE, num_workers=CORES, prefetch_factor=4,
            pin_memory=checkpoint_io.default_device().type == "cuda", multiprocessing_context="fork",
        )  # fmt: skip
        return sum(len(score_batch(images_BHWC.numpy())[0]) for images_BHWC in loader), 0.0

    return run


def prepare_ray_data(workload: Workload) -> Run:
    """Prepare a Ray Data pipeline.

    Tasks read the tars and decode. An actor scores batches. The clock starts when the actor has loaded the network, and
    Ray waits for the actor. Its start-up takes more than ten seconds, which would not matter in a long scan.
    """
    import ray

    # The code is pickled by value, so that Ray's workers import torch only. Imports of ours would count against Ray.
    for module in (Case.__module__, __name__):
        # Its types are known only where Ray is installed.
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])  # type: ignore[no-untyped-call,unused-ignore]
    case, checkpoint = workload.case, workload.checkpoint
    on_gpu = checkpoint_io.default_device().type == "cuda"

    def run() -> tuple[int, float]:
        started = time.time()
        ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().wait_for_min_actors_s = 600
        ray.data.DataContext.get_current().enable_progress_bars = False
        images = ray.data.read_webdataset(workload.tars, decoder=None)
        decoded = images.map(lambda row: {"image": decode_with_torchvision(row["jpg"], case).numpy()})
        # The actor asks for another number of CPUs than the decoding tasks. Otherwise Ray decodes in the one actor.
        scored = decoded.map_batches(
            RayScorer, fn_constructor_args=(checkpoint, case), batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=1), num_gpus=1 if on_gpu else None, num_cpus=0.9,
        )  # fmt: skip
        batches = list(scored.iter_batches(batch_size=None))
        return sum(len(batch["labels"]) for batch in batches), float(batches[0]["ready"][0]) - started

    return run


def load_blocking_scorer(checkpoint: str, case: Case) -> Callable[[Batch], Best]:
    """Load the network as a script calls it: one batch after the other.

    On a CPU, all cores work on each batch.

    Args:
        checkpoint: The path of the checkpoint.
        case: The case.

    Returns:
        A function that scores one batch.
    """
    model, device = checkpoint_io.load_model(checkpoint)[0], checkpoint_io.default_device()
    if device.type == "cuda":
        gpu_scorer = scoring.GpuScorer(
            model, case.preprocessing, CLASSES_PER_IMAGE, device, str(Path(checkpoint).parent)
        )
        return lambda images_BHWC: gpu_scorer.submit(images_BHWC)()
    cpu_scorer = scoring.ScoringModule(model, case.preprocessing, CLASSES_PER_IMAGE, bf16=False).eval()
    cpu_scorer.set_memory_format(DEFAULT_SCORING_MODE)

    @torch.inference_mode()
    def score_batch(images_BHWC: Batch) -> Best:
        best: Best = cpu_scorer(torch.from_numpy(images_BHWC))
        return best

    return score_batch


def decode_with_torchvision(data: bytes, case: Case) -> torch.Tensor:
    """Decode and crop with torchvision's own transforms, as a user would.

    Args:
        data: The JPEG file.
        case: The case.

    Returns:
        The image, uint8 HWC.
    """
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as F

    image_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    short = round(case.resolution * 256 / 224) if case.augmentation == "crop-flip" else case.resolution
    resized_CHW = F.resize(image_CHW, [short], antialias=True)
    cropped_CHW: torch.Tensor = F.center_crop(resized_CHW, [case.resolution] * 2)
    return cropped_CHW.permute(1, 2, 0).contiguous()


class TarImages(IterableDataset[torch.Tensor]):
    """The decoded images of tars. Each worker decodes its share of the images."""

    def __init__(self, tars: list[str], case: Case) -> None:
        self._tars, self._case = tars, case

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        assert worker is not None
        torch.set_num_threads(1)
        images = (data for tar in self._tars for data in jpeg_members(Path(tar)))
        for number, data in enumerate(images):
            if number // IMAGES_PER_BLOCK % worker.num_workers == worker.id:
                yield decode_with_torchvision(data, self._case)


class RayScorer:
    """The network in a Ray actor."""

    def __init__(self, checkpoint: str, case: Case) -> None:
        torch.set_num_threads(CORES)
        self._score_batch = load_blocking_scorer(checkpoint, case)
        self._ready = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        labels_BP, scores_BP = self._score_batch(np.ascontiguousarray(batch["image"]))
        ready = np.full(len(labels_BP), self._ready)
        return {"labels": labels_BP.numpy(), "scores": scores_BP.numpy(), "ready": ready}
