"""The scan of one shard: decoded images in, each one's best classes out. Only this module of the stage knows torch."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.score.feed import Feed, Prepared
from components.score.parts import Part
from components.shared import models, networks
from components.shared.progress import Progress
from components.shared.receipts import Clocks, Failure, ShardCount, TrainReceipt
from components.shared.shards import Columns, Sample, Shard

# Fixed, the last batch of a shard included, so that an image's scores do not depend on how many others came with it.
BATCH_ON_CPU, BATCH_ON_GPU = 64, 256
MAX_FAILURES_LISTED = 100  # of each shard; all are counted


def log_odds(logits_BC: Tensor, classes: int) -> tuple[Tensor, Tensor]:
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


class Scan:
    """One pod's scan: the teacher on its device, the feed of decoded images, the clocks.

    `share` says how much of the pool is done, for the progress line.
    """

    def __init__(self, teacher: TrainReceipt, kept: int, columns: Columns, share: Callable[[], str]) -> None:
        models.use_threads()
        self._kept, self._share, self._progress = kept, share, Progress("score", 0)
        self._device = models.device()
        self._preprocessing = teacher.preprocessing
        self._architecture, self._classes = teacher.architecture, len(teacher.classes)
        self._model = models.read(teacher.checkpoint)[0].to(self._device).eval()
        batch_size = BATCH_ON_GPU if self._device.type == "cuda" else BATCH_ON_CPU
        self._feed = Feed(teacher.preprocessing, columns, batch_size)
        self._forward = self._on_gpu() if self._device.type == "cuda" else self._model

    @torch.inference_mode()
    def shard(self, shard: Shard) -> Part:
        """Score one shard. Memory: its rows and keys, about 100 bytes an image at ten classes each."""
        began = time.monotonic()
        before = self._feed.read_s, self._feed.decode_s
        forward_s = 0.0
        found: list[tuple[Prepared, Tensor, Tensor]] = []
        for batch in self._feed.batches(shard):
            started = time.monotonic()
            images_BCHW = models.normalised(batch.images_BHWC, self._preprocessing, self._device)
            labels_BP, scores_BP = log_odds(self._forward(images_BCHW), self._kept)
            found.append((batch, labels_BP.cpu(), scores_BP.cpu()))
            forward_s += time.monotonic() - started
            self._progress.add(len(batch.samples), self._share())
        clocks = Clocks(
            read=round(self._feed.read_s - before[0], 3),
            decode=round(self._feed.decode_s - before[1], 3),
            forward=round(forward_s, 3),
        )
        return replace(_part(shard, found, clocks, self._kept), seconds=round(time.monotonic() - began, 3))

    def _on_gpu(self) -> nn.Module:
        """Return the model in bf16 and channels_last, compiled, its head in fp32."""
        heads = networks.head_tensors(self._architecture, self._classes, self._preprocessing.resolution)
        model = _InHalf(self._model.to(memory_format=torch.channels_last), heads)
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        return compiled


class _InHalf(nn.Module):
    """A network that runs in bf16, but for its head, which ranks the images."""

    def __init__(self, model: nn.Module, heads: set[str]) -> None:
        super().__init__()
        self.model = networks.float_head(model, heads)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return cast(Tensor, self.model(images_BCHW.contiguous(memory_format=torch.channels_last)))


def _part(shard: Shard, found: list[tuple[Prepared, Tensor, Tensor]], clocks: Clocks, kept: int) -> Part:
    """Put the batches of a shard together, leaving out the places that have no image."""
    failures = [
        Failure(shard=shard.name, key=sample.key, reason=problem)
        for batch, _, _ in found
        for sample, problem in zip(batch.samples, batch.problems, strict=True)
        if problem
    ]
    usable = [np.array([not problem for problem in batch.problems], bool) for batch, _, _ in found]
    samples = [
        sample
        for (batch, _, _), chosen in zip(found, usable, strict=True)
        for sample, scored in zip(batch.samples, chosen, strict=True)
        if scored
    ]
    labels = [labels_BP.numpy()[: len(chosen)][chosen] for (_, labels_BP, _), chosen in zip(found, usable, strict=True)]
    values = [scores_BP.numpy()[: len(chosen)][chosen] for (_, _, scores_BP), chosen in zip(found, usable, strict=True)]
    failed = dict(Counter(failure.reason for failure in failures))
    listed = len(samples) + len(failures)
    return Part(
        count=ShardCount(shard=shard.name, digest=shard.digest(), listed=listed, scored=len(samples), failed=failed),
        failures=failures[:MAX_FAILURES_LISTED],
        clocks=clocks,
        seconds=0.0,
        samples=_table(samples),
        labels_BP=_stacked(labels, kept).astype(np.uint16),
        scores_BP=_stacked(values, kept).astype(np.float32),
    )


def _stacked(parts: list[NDArray[np.generic]], kept: int) -> NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.empty((0, kept))


def _table(samples: list[Sample]) -> pa.Table:
    def column(name: str) -> Iterator[object]:
        return (getattr(sample, name) for sample in samples)

    return pa.table(
        {
            "index": pa.array(column("index"), pa.int64()),
            "key": pa.array(column("key"), pa.string()),
            "uri": pa.array(column("uri"), pa.string()),
            "offset": pa.array(column("offset"), pa.int64()),
            "size_bytes": pa.array((len(sample.image) for sample in samples), pa.int64()),
        }
    )
