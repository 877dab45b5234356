"""Forward decoded images through the teacher, and collect each shard's scores."""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from semiscale.common.cpu import available_cpus
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, Shard
from semiscale.models import checkpoint_io, networks
from semiscale.receipts.base import BadSample
from semiscale.receipts.score import PartImageCounts, PartSeconds, ShardAccounting
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.score import scorer
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.gpu_decoding import GpuDecoder
from semiscale.stages.score.process_shard_loader import ProcessShardLoader
from semiscale.stages.score.scorer import Best
from semiscale.stages.score.shard_loader import DecodedBatch, ShardLoader, ShardSpan
from semiscale.stages.score.shard_scores import MAX_FAILURES_LISTED, ShardScores
from semiscale.stages.score.thread_shard_loader import ThreadShardLoader, buffer_shape

# Scores that are not finite would rank before or after all others. Receipts store this reason.
NOT_FINITE = "the teacher's scores are not finite"
_COLUMNS = pa.schema(
    [
        ("index", pa.int64()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
    ]
)


class Scanner:
    """One pod's scan with one teacher on one device.

    Args:
        config: The inputs of this pod.
        teacher: The teacher's receipt.
        num_kept: Number of classes that are stored per image.
        columns: Parquet columns of the samples.
        folder: Folder of the scores. The pods that share it run the network in the same execution mode.
    """

    def __init__(
        self,
        config: ScoreConfig,
        teacher: TrainReceipt,
        num_kept: int,
        columns: SampleFields,
        folder: str,
    ) -> None:
        self._num_kept = num_kept
        checkpoint_io.configure_torch()
        device, preprocessing = checkpoint_io.default_device(), teacher.preprocessing
        self._loader = _make_loader(device, preprocessing, columns, decodes_on_gpu=config.decoder == "gpu")
        heads = networks.head_parameter_names(teacher.architecture, len(teacher.classes), preprocessing.resolution)
        model = networks.run_head_in_fp32(checkpoint_io.load_model(teacher.checkpoint)[0], heads)
        self._scorer = scorer.make_scorer(device, model, preprocessing, num_kept, folder)

    def scan(
        self, shards: Iterable[Shard], on_images: Callable[[Shard, int, int], None]
    ) -> Generator[tuple[Shard, ShardScores]]:
        """Score shards, and yield each one when its last image is scored.

        All batches have the same size, including the last one. An image's scores then do not depend on how many images
        are left at the end.

        Args:
            shards: Shards to score. They are iterated over in another thread.
            on_images: Receives a shard, and how many more of its images and encoded bytes were scored.

        Yields:
            Each shard with its scores. The seconds of the scores are those since the shard before.

        Raises:
            SemiscaleError: A sample of a shard was lost between reading and scoring, or the loader failed.

        Cost:
            Memory: rows and keys of one shard per reading process, 300 bytes an image at ten classes each, and twice as
            many at the end of a shard.
        """
        # Several worker processes read, so several shards are in progress.
        accumulators: dict[int, _ShardAccumulator] = {}
        began = time.monotonic()
        for batch, best, seconds in self._score_batches(shards):
            for span in batch.spans:
                accumulator = accumulators.setdefault(id(span.shard), _ShardAccumulator(span.shard))
                accumulator.add(span, best, seconds * len(span.samples) / max(len(batch), 1))
                on_images(span.shard, len(span.samples), sum(sample.size_bytes for sample in span.samples))
                if span.is_last:
                    began, shard_s = time.monotonic(), time.monotonic() - began
                    del accumulators[id(span.shard)]
                    yield span.shard, accumulator.to_shard_scores(self._num_kept, span.listed, round(shard_s, 3))
            self._loader.release(batch.slot)

    def _score_batches(self, shards: Iterable[Shard]) -> Iterator[tuple[DecodedBatch, Best, float]]:
        """Yield each batch with its best classes and the seconds of waiting for them.

        While a batch is yielded, the next ones are computed.
        """
        computing: deque[tuple[DecodedBatch, Callable[[], Best], float]] = deque()
        with closing(self._loader.batches(shards)) as batches:
            for batch in batches:
                started = time.monotonic()
                result = self._scorer.submit(batch.images_BHWC)
                computing.append((batch, result, time.monotonic() - started))
                if len(computing) == self._scorer.in_flight:
                    yield _wait_for(*computing.popleft())
            while computing:
                yield _wait_for(*computing.popleft())


def _make_loader(
    device: torch.device, preprocessing: Preprocessing, columns: SampleFields, *, decodes_on_gpu: bool
) -> ShardLoader:
    """Make the loader that suits a device.

    Only a GPU needs worker processes, because decoding threads delay the thread that launches its kernels. A GPU that
    decodes needs none.
    """
    batch_size, in_use = scorer.batch_size_and_depth(device, preprocessing)
    if device.type == "cuda" and not decodes_on_gpu:
        return ProcessShardLoader(preprocessing, columns, batch_size, in_use)
    num_slots, shape = buffer_shape(preprocessing, batch_size, in_use, available_cpus())
    slots = np.zeros((num_slots, *shape), np.uint8)
    gpu_decoder = GpuDecoder(preprocessing, device) if decodes_on_gpu else None
    return ThreadShardLoader(preprocessing, columns, slots, in_use, available_cpus(), gpu_decoder)


def _wait_for(batch: DecodedBatch, result: Callable[[], Best], seconds: float) -> tuple[DecodedBatch, Best, float]:
    started = time.monotonic()
    best = result()
    return batch, best, seconds + time.monotonic() - started


@dataclass
class _ShardAccumulator:
    """Collects the scores of one shard."""

    shard: Shard
    rows: list[tuple[int, str, str, int, int]] = field(default_factory=list)
    labels: list[NDArray[np.uint16]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[BadSample] = field(default_factory=list)
    clocks: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def add(self, span: ShardSpan, best: Best, forward_s: float) -> None:
        """Add a span of a batch.

        Args:
            span: Samples of this shard.
            best: Labels and log-odds of the whole batch. The positions of samples that failed are left out.
            forward_s: Seconds of the network for this span.
        """
        finite = best[1][span.slice].isfinite().all(1).tolist()
        problems = [
            sample.problem or ("" if is_finite else NOT_FINITE)
            for sample, is_finite in zip(span.samples, finite, strict=True)
        ]
        scored = np.array([not problem for problem in problems], bool)
        labels_BP, scores_BP = (tensor[span.slice].numpy()[scored] for tensor in best)
        self.labels.append(labels_BP.astype(np.uint16))
        self.scores.append(scores_BP.astype(np.float32))
        for sample, problem in zip(span.samples, problems, strict=True):
            if problem:
                self._add_failure(sample.key, problem)
            else:
                self.rows.append((sample.sample_index, sample.key, sample.uri, sample.offset, sample.size_bytes))
        decode_s = sum(sample.seconds for sample in span.samples)
        self.clocks.update({"read": span.read_s, "decode": decode_s, "forward": forward_s})
        self.images.update(
            read=len(span.samples),
            decode=sum(sample.has_data for sample in span.samples),
            forward=sum(not sample.problem for sample in span.samples),
            write=int(scored.sum()),
        )

    def _add_failure(self, key: str, reason: str) -> None:
        self.failed[reason] += 1
        if len(self.failures) < MAX_FAILURES_LISTED:
            self.failures.append(BadSample(shard=self.shard.name, key=key, reason=reason))

    def to_shard_scores(self, num_kept: int, listed: int, seconds: float) -> ShardScores:
        """Return the scores of the whole shard.

        Args:
            num_kept: Number of classes that are stored per image.
            listed: Number of samples that were read of the shard.
            seconds: Seconds of the shard's scan.

        Raises:
            SemiscaleError: A sample was lost. Such scores are never written.
        """
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(_COLUMNS)
        count = ShardAccounting(
            shard=self.shard.name,
            digest=self.shard.digest(),
            listed=listed,
            scored=len(self.rows),
            failed=dict(self.failed),
            clocks=PartSeconds(**{part: round(seconds, 3) for part, seconds in self.clocks.items()}),
            images=PartImageCounts(**self.images),
        )
        count.check_complete()
        return ShardScores(
            count=count,
            failures=self.failures,
            seconds=seconds,
            samples=pa.table([pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS),
            labels_BP=np.concatenate([np.empty((0, num_kept), np.uint16), *self.labels]),
            scores_BP=np.concatenate([np.empty((0, num_kept), np.float32), *self.scores]),
        )
