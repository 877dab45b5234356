"""The scan: shards in, each one's part out. It joins the feed of decoded images and the teacher on its device."""

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
from semiscale.stages.score.shard_loader import DecodedBatch, ShardLoader, ShardSpan, buffer_shape
from semiscale.stages.score.shard_scores import ShardScores

NOT_FINITE = "the teacher's scores are not finite"  # they would be ranked before or behind all others
MAX_FAILURES_LISTED = 100  # of each shard; all are counted
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
        kept: Number of classes that are kept per image.
        columns: Parquet columns of the samples.
        folder: Folder of the scores. The pods that share it run the network in the same execution mode.
    """

    def __init__(
        self,
        config: ScoreConfig,
        teacher: TrainReceipt,
        kept: int,
        columns: SampleFields,
        folder: str,
    ) -> None:
        self._kept = kept
        checkpoint_io.configure_torch()
        device, preprocessing = checkpoint_io.default_device(), teacher.preprocessing
        self._feed = _feed(device, preprocessing, columns, decodes_on_gpu=config.decoder == "gpu")
        heads = networks.head_parameter_names(teacher.architecture, len(teacher.classes), preprocessing.resolution)
        model = networks.run_head_in_fp32(checkpoint_io.load_model(teacher.checkpoint)[0], heads)
        self._on = scorer.make_scorer(device, model, preprocessing, kept, folder)

    def scan(
        self, shards: Iterable[Shard], on_images: Callable[[Shard, int, int], None]
    ) -> Generator[tuple[Shard, ShardScores]]:
        """Score shards, and yield each one when its last image is scored.

        All batches have one size, the last one too. The scores of an image do not depend on the size of the remainder.

        Args:
            shards: Shards to score. They are iterated over in another thread.
            on_images: Receives a shard, and how many of its images and encoded bytes were scored.

        Cost:
            Memory: rows and keys of one shard per reading process, 300 bytes an image at ten classes each, and twice as
            many at the end of a shard.
        """
        # Several processes read, so that several shards are under way.
        tallies: dict[int, _ShardAccumulator] = {}
        began = time.monotonic()
        for batch, best, seconds in self._scored(shards):
            for span in batch.spans:
                tally = tallies.setdefault(id(span.shard), _ShardAccumulator(span.shard))
                tally.add(span, best, seconds * len(span.seen) / max(len(batch), 1))
                on_images(span.shard, len(span.seen), sum(sample.size_bytes for sample in span.seen))
                if span.ends:
                    began, seconds_here = time.monotonic(), time.monotonic() - began
                    yield span.shard, tallies.pop(id(span.shard)).part(self._kept, span.listed, round(seconds_here, 3))
            self._feed.release(batch.slot)

    def _scored(self, shards: Iterable[Shard]) -> Iterator[tuple[DecodedBatch, Best, float]]:
        """Yield batches with what was found and the seconds of waiting for it; each while the next is computed."""
        computing: deque[tuple[DecodedBatch, Callable[[], Best], float]] = deque()
        with closing(self._feed.batches(shards)) as batches:
            for batch in batches:
                started = time.monotonic()
                result = self._on.submit(batch.images_BHWC)
                computing.append((batch, result, time.monotonic() - started))
                if len(computing) == self._on.in_flight:
                    yield _wait_for(*computing.popleft())
            while computing:
                yield _wait_for(*computing.popleft())


def _feed(
    device: torch.device, preprocessing: Preprocessing, columns: SampleFields, *, decodes_on_gpu: bool
) -> ShardLoader | ProcessShardLoader:
    """Return what decodes: for a GPU other processes, unless it decodes itself; a CPU's work holds up no thread."""
    batch_size, in_use = scorer.batch_size_and_depth(device, preprocessing)
    if device.type == "cuda" and not decodes_on_gpu:
        return ProcessShardLoader(preprocessing, columns, batch_size, in_use)
    count, shape = buffer_shape(preprocessing, batch_size, in_use, available_cpus())
    on_gpu = GpuDecoder(preprocessing, device) if decodes_on_gpu else None
    return ShardLoader(preprocessing, columns, np.zeros((count, *shape), np.uint8), in_use, available_cpus(), on_gpu)


def _wait_for(batch: DecodedBatch, result: Callable[[], Best], seconds: float) -> tuple[DecodedBatch, Best, float]:
    started = time.monotonic()
    best = result()
    return batch, best, seconds + time.monotonic() - started


@dataclass
class _ShardAccumulator:
    """What has been found of one shard so far."""

    shard: Shard
    rows: list[tuple[int, str, str, int, int]] = field(default_factory=list)
    labels: list[NDArray[np.uint16]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[BadSample] = field(default_factory=list)
    clocks: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def add(self, span: ShardSpan, best: Best, forward_s: float) -> None:
        """Add a span of a batch, leaving out the places that have no image."""
        finite = best[1][span.slice].isfinite().all(1).tolist()
        problems = [one.problem or ("" if fine else NOT_FINITE) for one, fine in zip(span.seen, finite, strict=True)]
        scored = np.array([not problem for problem in problems], bool)
        labels_BP, scores_BP = (part[span.slice].numpy()[scored] for part in best)
        self.labels.append(labels_BP.astype(np.uint16))
        self.scores.append(scores_BP.astype(np.float32))
        for one, problem in zip(span.seen, problems, strict=True):
            if problem:
                self._fail(one.key, problem)
            else:
                self.rows.append((one.sample_index, one.key, one.uri, one.offset, one.size_bytes))
        self.clocks.update({"read": span.read_s, "decode": sum(one.seconds for one in span.seen), "forward": forward_s})
        self.images.update(
            read=len(span.seen),
            decode=sum(one.there for one in span.seen),
            forward=sum(not one.problem for one in span.seen),
            write=int(scored.sum()),
        )

    def _fail(self, key: str, reason: str) -> None:
        self.failed[reason] += 1
        if len(self.failures) < MAX_FAILURES_LISTED:
            self.failures.append(BadSample(shard=self.shard.name, key=key, reason=reason))

    def part(self, kept: int, listed: int, seconds: float) -> ShardScores:
        """Return the part of the whole shard, which has `listed` samples; `seconds` passed since the one before it.

        Raises SemiscaleError where one has been lost: such a part is never written.
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
            labels_BP=np.concatenate([np.empty((0, kept), np.uint16), *self.labels]),
            scores_BP=np.concatenate([np.empty((0, kept), np.float32), *self.scores]),
        )
