"""Compute the logits of a model on a labeled split."""

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from semiscale.common.cpu import available_cpus
from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import prefetch
from semiscale.data import eval_transforms
from semiscale.data.image_decoding import describe_decode_error
from semiscale.data.labeled import LabeledSplit, load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields
from semiscale.data.transforms import Batch
from semiscale.models import normalization

BATCH = 256
# Batches that are ready or being decoded, while the model works on another.
PREFETCH_BATCHES = 2
# Images that a thread decodes at a time. Videos are decoded one by one.
DECODE_CHUNK = 4
# Decoded images that are cached for the next model: 7,133 at 224 pixels.
CACHE_BYTES = 1 << 30


class EvalLoader:
    """Load a labeled split in a fixed order, cropped for evaluation.

    Cost: at most CACHE_BYTES of memory. A smaller split is decoded once. A larger one is decoded again for every
    model, with at most four batches in memory. ImageNet's 50,000 validation images have 7.5 GB.

    Args:
        split: Labeled split.
        columns: Columns of images and labels.
        preprocessing: Preprocessing of the model.
    """

    def __init__(self, split: LabeledSplit, columns: SampleFields, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._columns = columns
        self._shards = load_split(split)
        # Samples are read in their stored order.
        self.labels_B = torch.tensor([label for shard in self._shards for label in shard.labels.tolist() if label >= 0])
        self._batch_size = eval_transforms.eval_batch_size(BATCH, preprocessing)
        size_bytes = math.prod(eval_transforms.eval_view_shape(preprocessing)) * len(self.labels_B)
        self._cached = list(self._decode_batches()) if size_bytes <= CACHE_BYTES else None

    @property
    def num_batches(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.labels_B) / self._batch_size)

    def batches(self) -> Generator[Batch]:
        """Yield images_BHWC of at most BATCH images, or fewer videos with all their views.

        The next batches are read and decoded while the caller works on one.

        Raises:
            SemiscaleError: An image cannot be read (SEMI-E154).
        """
        return (
            (batch for batch in self._cached)
            if self._cached is not None
            else prefetch(self._decode_batches(), PREFETCH_BATCHES)
        )

    def _decode_batches(self) -> Generator[Batch]:
        with closing(self._decode_chunks()) as chunks:
            views = (view for chunk in chunks for view in chunk.result())
            for first in views:
                yield np.stack([first, *islice(views, self._batch_size - 1)])

    def _decode_chunks(self) -> Generator[Future[list[Batch]]]:
        """Yield futures of neighbouring samples. Two chunks for each thread are in flight."""
        samples = (sample for shard in self._shards for sample, _ in shard.iter_samples(self._columns, prefetch=True))
        chunk_size = 1 if self.preprocessing.frames else DECODE_CHUNK
        threads = available_cpus()
        in_flight: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            while chunk := list(islice(samples, chunk_size)):
                in_flight.append(pool.submit(self._decode_all, chunk))
                if len(in_flight) > 2 * threads:
                    yield in_flight.popleft()
            yield from in_flight

    def _decode_all(self, samples: list[Sample]) -> list[Batch]:
        return [self._decode(sample) for sample in samples]

    def _decode(self, sample: Sample) -> Batch:
        try:
            return eval_transforms.eval_view(sample.image, self.preprocessing)
        except Exception as error:
            image = f"{sample.uri}: {sample.key}"
            raise SemiscaleError(
                "SEMI-E154",
                f"{image}: {describe_decode_error(error, image)}. The plan could read it. Restore the file.",
            ) from error


@torch.inference_mode()
def predict_logits(
    model: nn.Module, split: EvalLoader, on: torch.device, counting: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Compute the logits of a model on every image of a split.

    The logits of a video are the logarithm of the mean of its clips' softmax (section 5.1).

    Args:
        model: Model on the device. Its training mode is restored.
        split: Loader of the images.
        on: Device of the model.
        counting: Called with the number of images after each batch.

    Returns:
        fp32 logits_BC on the CPU.
    """
    training = model.training
    model.eval()
    forward = _mean_over_clips if split.preprocessing.frames else nn.Module.__call__
    parts = []
    try:
        with closing(split.batches()) as batches:
            for batch in batches:
                parts.append(
                    forward(model, normalization.to_normalized_batch(batch, split.preprocessing, on)).float().cpu()
                )
                counting(len(batch))
    finally:
        model.train(training)
    return torch.cat(parts)


def _mean_over_clips(model: nn.Module, clips_BVCTHW: Tensor) -> Tensor:
    logits_BVC: Tensor = model(clips_BVCTHW.flatten(0, 1)).float().unflatten(0, clips_BVCTHW.shape[:2])
    return logits_BVC.log_softmax(-1).logsumexp(1) - math.log(logits_BVC.shape[1])
