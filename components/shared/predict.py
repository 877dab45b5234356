"""A model's logits on a labeled split: what accuracy is computed from."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from components.shared import models
from components.shared.decode import Pixels, decode
from components.shared.preprocess import fixed_cut
from components.shared.receipts import Preprocessing, Split
from components.shared.shards import Columns, Sample
from components.shared.splits import read_split

BATCH = 256


class PreparedSplit:
    """A labeled split, decoded and cut once, for models that are measured on it more than once.

    Memory: resolution² x 3 bytes an image; 7.5 GB for ImageNet's 50,000 validation images at 224 pixels.
    """

    def __init__(self, split: Split, columns: Columns, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        samples = (pair for shard in read_split(split) for pair in shard.read(columns))
        cuts: list[Pixels] = []
        labels: list[int] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch in _batches(samples):
                cuts.extend(pool.map(self._prepare, [sample for sample, _ in batch]))
                labels.extend(label for _, label in batch)
        self.images_BHWC = np.stack(cuts)
        self.labels_B = torch.tensor(labels)

    def _prepare(self, sample: Sample) -> Pixels:
        return fixed_cut(decode(sample.image), self.preprocessing)


def _batches(samples: Iterator[tuple[Sample, int]]) -> Iterator[list[tuple[Sample, int]]]:
    while batch := list(islice(samples, BATCH)):
        yield batch


@torch.inference_mode()
def logits(model: nn.Module, split: PreparedSplit, on: torch.device) -> Tensor:
    """Return the logits_BC of every image of a split, on the CPU. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    parts = []
    for start in range(0, len(split.images_BHWC), BATCH):
        images = models.normalised(split.images_BHWC[start : start + BATCH], split.preprocessing, on)
        parts.append(model(images).float().cpu())
    model.train(training)
    return torch.cat(parts)


def hits(logits_BC: Tensor, labels_B: Tensor, top: int) -> Tensor:
    """Say for every image whether its label is among the `top` best classes: bool, one an image."""
    best = logits_BC.topk(min(top, logits_BC.shape[1])).indices
    return (best == labels_B[:, None]).any(1)
