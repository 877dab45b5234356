"""A model's logits on a labeled split: what accuracy is computed from."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from components.shared import models, views
from components.shared.cores import cores
from components.shared.decode import reason
from components.shared.errors import SemiscaleError
from components.shared.preprocess import Batch
from components.shared.receipts import Preprocessing, Split
from components.shared.shards import Columns, Sample
from components.shared.splits import read_split

BATCH = 256
HELD_BYTES = 1 << 30  # of decoded images kept for the next model: 7,133 at 224 pixels, all of a small set


class PreparedSplit:
    """A labeled split's images in a fixed order, cut as models see them when they are measured.

    Memory: HELD_BYTES at most. A smaller split is decoded once; of a larger one, such as ImageNet's 50,000 validation
    images with their 7.5 GB, three batches at a time are held, and it is read again for every model.
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

    def batches(self) -> Iterator[Batch]:
        """Yield all images, images_BHWC of BATCH images at most; of videos fewer, the views of each.

        Raises SemiscaleError where one cannot be read.
        """
        return iter(self._held) if self._held is not None else self._decoded()

    def _decoded(self) -> Iterator[Batch]:
        samples = (sample for shard in self._shards for sample, _ in shard.read(self._columns))
        with ThreadPoolExecutor(cores()) as pool:
            before: list[Future[Batch]] = []
            while batch := list(islice(samples, self._together)):
                decoding = [pool.submit(self._prepare, sample) for sample in batch]
                if before:
                    yield np.stack([future.result() for future in before])
                before = decoding
            if before:
                yield np.stack([future.result() for future in before])

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
    for one in split.batches():
        parts.append(forward(model, models.normalised(one, split.preprocessing, on)).float().cpu())
        counting(len(one))
    model.train(training)
    return torch.cat(parts)


def _mean_over_clips(model: nn.Module, clips_BVCTHW: Tensor) -> Tensor:
    logits_BVC: Tensor = model(clips_BVCTHW.flatten(0, 1)).float().unflatten(0, clips_BVCTHW.shape[:2])
    return logits_BVC.log_softmax(-1).logsumexp(1) - math.log(logits_BVC.shape[1])


def hits(logits_BC: Tensor, labels_B: Tensor, top: int) -> Tensor:
    """Say for every image whether its label is among the `top` best classes: bool, one an image."""
    best = logits_BC.topk(min(top, logits_BC.shape[1])).indices
    return (best == labels_B[:, None]).any(1)
