"""A model's logits on a labeled split: what accuracy is computed from."""

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
from semiscale.common.prefetch import prefetch_one
from semiscale.data import eval_transforms
from semiscale.data.image_decoding import describe_decode_error
from semiscale.data.labeled import LabeledSplit, load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields
from semiscale.data.transforms import Batch
from semiscale.models import normalization

BATCH = 256
DECODE_CHUNK = 4  # images that a thread is handed at a time; of videos one
CACHE_BYTES = 1 << 30  # of decoded images kept for the next model: 7,133 at 224 pixels, all of a small set


class EvalLoader:
    """A labeled split's images in a fixed order, cut as models see them when they are measured.

    Memory: HELD_BYTES at most. A smaller split is decoded once; of a larger one, such as ImageNet's 50,000 validation
    images with their 7.5 GB, four batches are held at most, and it is read again for every model.
    """

    def __init__(self, split: LabeledSplit, columns: SampleFields, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._columns = columns
        self._shards = load_split(split)
        # Samples are read in the order they are stored in.
        self.labels_B = torch.tensor([label for shard in self._shards for label in shard.labels.tolist() if label >= 0])
        self._together = eval_transforms.eval_batch_size(BATCH, preprocessing)
        size_bytes = math.prod(eval_transforms.eval_view_shape(preprocessing)) * len(self.labels_B)
        self._held = list(self._decoded()) if size_bytes <= CACHE_BYTES else None

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return math.ceil(len(self.labels_B) / self._together)

    def batches(self) -> Generator[Batch]:
        """Yield all images, images_BHWC of BATCH images at most; of videos fewer, the views of each.

        While the caller works on one batch, those behind it are read and decoded. Raises SemiscaleError where an image
        cannot be read.
        """
        return (batch for batch in self._held) if self._held is not None else prefetch_one(self._decoded())

    def _decoded(self) -> Generator[Batch]:
        with closing(self._parts()) as parts:
            views_of = (view for part in parts for view in part.result())
            for first in views_of:
                yield np.stack([first, *islice(views_of, self._together - 1)])

    def _parts(self) -> Generator[Future[list[Batch]]]:
        """Yield neighbouring samples, being decoded or done, two parts for every thread under way."""
        samples = (sample for shard in self._shards for sample, _ in shard.iter_samples(self._columns, ahead=True))
        together = 1 if self.preprocessing.frames else DECODE_CHUNK
        threads = available_cpus()
        under_way: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            while part := list(islice(samples, together)):
                under_way.append(pool.submit(self._prepare_all, part))
                if len(under_way) > 2 * threads:
                    yield under_way.popleft()
            yield from under_way

    def _prepare_all(self, samples: list[Sample]) -> list[Batch]:
        return [self._prepare(sample) for sample in samples]

    def _prepare(self, sample: Sample) -> Batch:
        try:
            return eval_transforms.eval_view(sample.image, self.preprocessing)
        except Exception as error:
            image = f"{sample.uri}: {sample.key}"
            raise SemiscaleError(
                f"{image}: {describe_decode_error(error, image)}; it was readable when planned"
            ) from error


@torch.inference_mode()
def predict_logits(
    model: nn.Module, split: EvalLoader, on: torch.device, counting: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Return the logits_BC of every image of a split, on the CPU. The model is left in the mode it was in.

    Of a video, logits of the mean of its clips' softmax (section 5.1): the logarithm of that mean. `counting` is told
    the images of each batch that is done.
    """
    training = model.training
    model.eval()
    forward = _mean_over_clips if split.preprocessing.frames else nn.Module.__call__
    parts = []
    try:
        with closing(split.batches()) as batches:
            for one in batches:
                parts.append(
                    forward(model, normalization.to_normalized_batch(one, split.preprocessing, on)).float().cpu()
                )
                counting(len(one))
    finally:
        model.train(training)
    return torch.cat(parts)


def _mean_over_clips(model: nn.Module, clips_BVCTHW: Tensor) -> Tensor:
    logits_BVC: Tensor = model(clips_BVCTHW.flatten(0, 1)).float().unflatten(0, clips_BVCTHW.shape[:2])
    return logits_BVC.log_softmax(-1).logsumexp(1) - math.log(logits_BVC.shape[1])
