"""Load shards before the model needs them.

One thread reads, and many threads decode into preallocated batches. The model never waits for an allocation. For a GPU,
this loader runs in worker processes.

Batches continue across the ends of shards, so small shards cost the model no more than large ones. Each image has a
fixed position in its batch, whether it can be decoded or not. The result therefore does not depend on the order in
which threads finish.
"""

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import Queue
from typing import NamedTuple

import torch

from semiscale.common.errors import SemiscaleError
from semiscale.data import eval_transforms, reader
from semiscale.data.image_decoding import describe_decode_error
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.data.transforms import Batch
from semiscale.stages.score.gpu_decoding import GpuDecoder

# Images that a thread gets at a time. Submitting a task costs a twentieth of decoding one image.
DECODE_CHUNK = 8
# When the scan stops, a read in progress is waited for so long.
SHUTDOWN_TIMEOUT_S = 5.0
# Batches that are decoded, or being decoded, while the model works on others.
PREFETCH_BATCHES = 4


class SampleInfo(NamedTuple):
    """A sample of a batch.

    Attributes:
        sample_index: Index in its shard.
        key: Key of the sample.
        uri: URI of the object that holds it.
        offset: Offset in that object, in bytes.
        size_bytes: Size of the encoded sample.
        has_data: Whether there was something to decode.
        problem: Reason why it has no pixels, or an empty string.
        seconds: Seconds of decoding.
    """

    sample_index: int
    key: str
    uri: str
    offset: int
    size_bytes: int
    has_data: bool
    problem: str
    seconds: float


class ShardSpan(NamedTuple):
    """Neighbouring positions of a batch that hold samples of one shard.

    Attributes:
        shard: The shard.
        start: First position in the batch.
        samples: Samples at the positions from `start` on.
        read_s: Seconds of reading.
        is_last: Whether this is the last span of the shard.
        listed: Number of samples that were read of the whole shard. It is set in the last span.
    """

    shard: Shard
    start: int
    samples: list[SampleInfo]
    read_s: float
    is_last: bool
    listed: int

    @property
    def slice(self) -> slice:
        """Positions of the samples in the batch."""
        return slice(self.start, self.start + len(self.samples))


@dataclass(frozen=True)
class DecodedBatch:
    """A batch of decoded samples.

    Attributes:
        slot: Slot of the buffer. The consumer has to release it.
        images_BHWC: Pixels. Positions after the last span hold pixels of an earlier batch.
        spans: Samples of the batch.
    """

    slot: int
    images_BHWC: Batch
    spans: list[ShardSpan]

    def __len__(self) -> int:
        return sum(len(span.samples) for span in self.spans)


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


class ShardLoader:
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
        self._gpu_decoder = gpu_decoder
        self._preprocessing, self._columns, self._slots_SBHWC = preprocessing, columns, slots
        self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
        self._chunk_size = 1 if preprocessing.frames else DECODE_CHUNK
        self._max_queued = len(slots) - in_use
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
        queue: Queue[_PendingBatch | BaseException | None] = Queue(self._max_queued)
        stop = threading.Event()
        thread = threading.Thread(target=self._read, args=(shards, queue, stop), daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                spans = [span.result() for span in item.spans]
                yield DecodedBatch(item.slot, self._slots_SBHWC[item.slot], spans)
        finally:
            stop.set()
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            # The thread may wait for room in the queue, for a free slot, or for a store that does not answer.
            while thread.is_alive() and time.monotonic() < deadline:
                self._drain(queue)
                thread.join(0.01)
            self._drain(queue)

    def release(self, slot: int) -> None:
        """Free the slot of a batch for the next one."""
        self._free_slots.put(slot)

    def _drain(self, queue: "Queue[_PendingBatch | BaseException | None]") -> None:
        while not queue.empty():
            item = queue.get_nowait()
            if isinstance(item, _PendingBatch):
                # The slot is free when no thread writes to it any more.
                for span in item.spans:
                    wait(span.decoding)
                self.release(item.slot)

    def _read(self, shards: Iterable[Shard], queue: "Queue[object]", stop: threading.Event) -> None:
        try:
            for batch in self._fill_batches(shards, stop):
                queue.put(batch)
        # The thread that takes the batches raises the error.
        except BaseException as error:  # noqa: BLE001
            queue.put(error)
        queue.put(None)

    def _fill_batches(self, shards: Iterable[Shard], stop: threading.Event) -> Iterator[_PendingBatch]:
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
        span.decoding.append(self._pool.submit(self._decode_chunk, span.samples[span.num_submitted :], images_BHWC))
        span.num_submitted = len(span.samples)

    def _decode_chunk(self, samples: list[Sample], images_BHWC: Batch) -> list[SampleInfo]:
        if self._gpu_decoder is None:
            return list(map(self._decode, samples, images_BHWC))
        started = time.monotonic()
        crops = self._gpu_decoder.decode_and_crop([sample.image for sample in samples])
        seconds_each = (time.monotonic() - started) / max(sum(crop is not None for crop in crops), 1)
        infos = []
        for sample, image_HWC, crop in zip(samples, images_BHWC, crops, strict=True):
            if crop is None:
                infos.append(self._decode(sample, image_HWC))
            else:
                image_HWC[:] = crop
                infos.append(_sample_info(sample, "", seconds_each))
        return infos

    def _decode(self, sample: Sample, image_HWC: Batch) -> SampleInfo:
        if sample.problem:
            return _sample_info(sample, sample.problem, 0.0)
        started = time.monotonic()
        problem = ""
        try:
            image_HWC[:] = eval_transforms.eval_view(sample.image, self._preprocessing)
        # One image in a billion may raise an error that nobody expects. It must not end the scan.
        except Exception as error:  # noqa: BLE001
            problem = describe_decode_error(error, f"{sample.uri}: {sample.key}")
        return _sample_info(sample, problem, time.monotonic() - started)


def _sample_info(sample: Sample, problem: str, seconds: float) -> SampleInfo:
    size_bytes, has_data = len(sample.image), not sample.problem
    return SampleInfo(sample.index, sample.key, sample.uri, sample.offset, size_bytes, has_data, problem, seconds)


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
