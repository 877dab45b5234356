"""Read and decode shards in threads of this process.

One thread reads, and many threads decode into preallocated batches. The model never waits for an allocation.

Batches continue across the ends of shards, so small shards cost the model no more than large ones. Each image has a
fixed position in its batch, whether it can be decoded or not. The result therefore does not depend on the order in
which threads finish.
"""

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from queue import Queue

import torch

from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import prefetch
from semiscale.data import eval_transforms, reader
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.data.transforms import Batch
from semiscale.stages.score.gpu_decoding import GpuDecoder
from semiscale.stages.score.sample_decoder import SampleDecoder
from semiscale.stages.score.shard_loader import SHUTDOWN_TIMEOUT_S, DecodedBatch, SampleInfo, ShardSpan

# Images that a thread gets at a time. Submitting a task costs a twentieth of decoding one image.
DECODE_CHUNK = 8
# Batches that are decoded, or being decoded, while the model works on others.
PREFETCH_BATCHES = 4


@dataclass
class _PendingSpan:
    """A span that is being read and decoded."""

    shard: Shard
    start: int
    samples: list[Sample] = field(default_factory=list)
    decoding: list[Future[list[SampleInfo]]] = field(default_factory=list)
    num_submitted: int = 0
    read_s: float = 0.0
    is_last: bool = False
    listed: int = 0

    def result(self) -> ShardSpan:
        """Return the span when all of its samples are decoded."""
        samples = [sample for future in self.decoding for sample in future.result()]
        return ShardSpan(self.shard, self.start, samples, self.read_s, self.is_last, self.listed)


@dataclass
class _PendingBatch:
    """The spans of a batch. The last one is being filled."""

    slot: int
    spans: list[_PendingSpan] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(span.samples) for span in self.spans)


def buffer_shape(
    preprocessing: Preprocessing, batch_size: int, in_use: int, threads: int
) -> tuple[int, tuple[int, ...]]:
    """Return how many slots a loader needs, and the shape of one slot.

    A batch may be a single video. The slots are enough for every thread to decode one video and have the next.

    Args:
        preprocessing: Resolution and number of frames.
        batch_size: Number of images, or videos, in a batch.
        in_use: Number of batches that the consumer may hold at a time.
        threads: Number of threads that decode.
    """
    num_slots = max(PREFETCH_BATCHES, 2 * threads // batch_size) + in_use
    return num_slots, (batch_size, *eval_transforms.eval_view_shape(preprocessing))


class ThreadShardLoader:
    """Reads and decodes shards in threads of this process.

    Args:
        preprocessing: Resolution and resizing.
        columns: Parquet columns of the samples.
        slots: Buffer of batches, pixels_SBHWC, that images are decoded into.
        in_use: Number of batches that the consumer may hold at a time.
        threads: Number of threads that decode.
        gpu_decoder: Decodes the images that it supports. The CPU decodes the rest.

    Cost:
        Memory of the buffer, of the encoded images of all slots but `in_use`, and of the data that the reader
        prefetches.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        columns: SampleFields,
        slots: Batch,
        in_use: int,
        threads: int,
        gpu_decoder: GpuDecoder | None = None,
    ) -> None:
        self._decoder = SampleDecoder(preprocessing, gpu_decoder)
        self._columns, self._slots_SBHWC = columns, slots
        self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
        self._chunk_size = 1 if preprocessing.frames else DECODE_CHUNK
        # The slots that the consumer does not hold, and one batch that waits for a slot.
        self._max_pending = len(slots) - in_use + 1
        self._free_slots: Queue[int] = Queue()
        for slot in range(len(slots)):
            self._free_slots.put(slot)

    def batches(self, shards: Iterable[Shard]) -> Generator[DecodedBatch]:
        """Yield decoded batches in the order of the shards.

        The last span of every shard is marked.

        Args:
            shards: Shards to load. The reading thread iterates over them.

        Yields:
            Batches. The consumer has to release the slot of each one.

        Raises:
            SemiscaleError: A shard disappeared. Other errors of iterating or reading are raised too, after the batches
                before them.
        """
        stop = threading.Event()
        pending = prefetch(
            self._fill_batches(shards, stop),
            self._max_pending,
            discard=self._discard,
            join_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        with closing(pending):
            try:
                for batch in pending:
                    spans = [span.result() for span in batch.spans]
                    yield DecodedBatch(batch.slot, self._slots_SBHWC[batch.slot], spans)
            finally:
                stop.set()

    def release(self, slot: int) -> None:
        """Free the slot of a batch for the next one."""
        self._free_slots.put(slot)

    def _discard(self, batch: _PendingBatch) -> None:
        """Free the slot of a batch that nobody takes, when no thread writes to it any more."""
        for span in batch.spans:
            wait(span.decoding)
        self.release(batch.slot)

    def _fill_batches(self, shards: Iterable[Shard], stop: threading.Event) -> Generator[_PendingBatch]:
        """Yield batches whose samples are read and submitted for decoding.

        All batches but the last one are full.
        """
        batch = _PendingBatch(self._free_slots.get())
        try:
            for shard in shards:
                batch.spans.append(_PendingSpan(shard, len(batch)))
                listed = 0
                for sample, seconds in _iter_timed_samples(shard, self._columns):
                    listed += 1
                    if stop.is_set():
                        yield batch
                        return
                    if len(batch) == self._slots_SBHWC.shape[1]:
                        self._submit_chunk(batch)
                        yield batch
                        batch = _PendingBatch(self._free_slots.get(), [_PendingSpan(shard, 0)])
                    span = batch.spans[-1]
                    span.read_s += seconds
                    span.samples.append(sample)
                    if len(span.samples) - span.num_submitted == self._chunk_size:
                        self._submit_chunk(batch)
                self._submit_chunk(batch)
                batch.spans[-1].is_last, batch.spans[-1].listed = True, listed
            yield batch
        except Exception:
            # The shards before the failed one are complete, so their samples are yielded.
            if batch.spans:
                self._submit_chunk(batch)
            yield batch
            raise

    def _submit_chunk(self, batch: _PendingBatch) -> None:
        """Submit the samples of the last span that are not submitted yet for decoding."""
        span = batch.spans[-1]
        positions = slice(span.start + span.num_submitted, span.start + len(span.samples))
        images_BHWC = self._slots_SBHWC[batch.slot][positions]
        span.decoding.append(
            self._pool.submit(self._decoder.decode_all, span.samples[span.num_submitted :], images_BHWC)
        )
        span.num_submitted = len(span.samples)


def _iter_timed_samples(shard: Shard, columns: SampleFields) -> Iterator[tuple[Sample, float]]:
    """Yield the samples of a shard, each with the seconds that reading it took."""
    try:
        started = time.monotonic()
        for sample in reader.iter_samples(shard, columns, prefetch=True):
            yield sample, time.monotonic() - started
            started = time.monotonic()
    except FileNotFoundError:
        raise SemiscaleError(
            "SEMI-E272", f"{shard.uri}: The shard disappeared after it was listed. Put it back, or run the plan again."
        ) from None
