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

from components.shared import models, views
from components.shared.ahead import one_ahead
from components.shared.cores import cores
from components.shared.decode import reason
from components.shared.errors import SemiscaleError
from components.shared.preprocess import Batch
from components.shared.receipts import Preprocessing, Split
from components.shared.shards import Columns, Sample
from components.shared.splits import read_split

BATCH = 256
TOGETHER = 4  # images that a thread is handed at a time; of videos one
HELD_BYTES = 1 << 30  # of decoded images kept for the next model: 7,133 at 224 pixels, all of a small set


class PreparedSplit:
    """A labeled split's images in a fixed order, cut as models see them when they are measured.

    Memory: HELD_BYTES at most. A smaller split is decoded once; of a larger one, such as ImageNet's 50,000 validation
    images with their 7.5 GB, four batches are held at most, and it is read again for every model.
    """

    def __init__(self, split: Split, columns: Columns, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._columns = columns
        self._shards = read_split(split)
        # Samples are read in the order they are stored in.
        self.labels_B = torch.tensor([label for shard in self._shards for label in shard.labels.tolist() if label >= 0])
        self._together = views.batch(BATCH, preprocessing)
        size_bytes = math.prod(views.shape(preprocessing)) * len(self.labels_B)
        self._held = list(self._decoded()) if size_bytes <= HELD_BYTES else None

    @property
    def count(self) -> int:
        """How many batches there are."""
        return math.ceil(len(self.labels_B) / self._together)

    def batches(self) -> Generator[Batch]:
        """Yield all images, images_BHWC of BATCH images at most; of videos fewer, the views of each.

        While the caller works on one batch, those behind it are read and decoded. Raises SemiscaleError where an image
        cannot be read.
        """
        return (batch for batch in self._held) if self._held is not None else one_ahead(self._decoded())

    def _decoded(self) -> Generator[Batch]:
        with closing(self._parts()) as parts:
            views_of = (view for part in parts for view in part.result())
            for first in views_of:
                yield np.stack([first, *islice(views_of, self._together - 1)])

    def _parts(self) -> Generator[Future[list[Batch]]]:
        """Yield neighbouring samples, being decoded or done, two parts for every thread under way."""
        samples = (sample for shard in self._shards for sample, _ in shard.read(self._columns, ahead=True))
        together = 1 if self.preprocessing.frames else TOGETHER
        threads = cores()
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
            return views.view(sample.image, self.preprocessing)
        except Exception as error:
            image = f"{sample.uri}: {sample.key}"
            raise SemiscaleError(f"{image}: {reason(error, image)}; it was readable when planned") from error


@torch.inference_mode()
def logits(
    model: nn.Module, split: PreparedSplit, on: torch.device, counting: Callable[[int], None] = lambda _: None
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
                parts.append(forward(model, models.normalised(one, split.preprocessing, on)).float().cpu())
                counting(len(one))
    finally:
        model.train(training)
    return torch.cat(parts)


def _mean_over_clips(model: nn.Module, clips_BVCTHW: Tensor) -> Tensor:
    logits_BVC: Tensor = model(clips_BVCTHW.flatten(0, 1)).float().unflatten(0, clips_BVCTHW.shape[:2])
    return logits_BVC.log_softmax(-1).logsumexp(1) - math.log(logits_BVC.shape[1])


def hits(logits_BC: Tensor, labels_B: Tensor, top: int) -> Tensor:
    """Say for every image whether its label is among the `top` best classes: bool, one an image."""
    best = logits_BC.topk(min(top, logits_BC.shape[1])).indices
    return (best == labels_B[:, None]).any(1)
