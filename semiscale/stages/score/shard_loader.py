"""Images ahead of the model: one thread reads shard after shard, many decode into preallocated batches, the model never
waits for an allocation. Beside a GPU this runs in processes of its own (feed_processes.py).

A batch is filled across the shards' ends, so that small shards cost the model no more than large ones. Every image has
its place in its batch, decoded or not, so that nothing depends on which thread was first.
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

DECODE_CHUNK = 8  # images that a thread is handed at a time: handing over costs as much as a twentieth of decoding one
SHUTDOWN_TIMEOUT_S = 5.0  # that a read under way is waited for, when the scan stops
PREFETCH_BATCHES = 4  # batches decoded or being decoded while the model works on others


class SampleInfo(NamedTuple):
    """One sample of a batch: what it is, and why it has no pixels ("" where it has).

    `sample_index` counts in its shard; `there`: whether there was something to decode; `seconds` of decoding.
    """

    sample_index: int
    key: str
    uri: str
    offset: int
    size_bytes: int
    there: bool
    problem: str
    seconds: float


class ShardSpan(NamedTuple):
    """Neighbouring places of a batch, from `start` on, that belong to one shard; `ends` where they are its last, and
    then `listed` is how many samples were read of the whole shard.
    """

    shard: Shard
    start: int
    seen: list[SampleInfo]
    read_s: float
    ends: bool
    listed: int

    @property
    def slice(self) -> slice:
        """Where in the batch the samples are."""
        return slice(self.start, self.start + len(self.seen))


@dataclass(frozen=True)
class DecodedBatch:
    """One batch: the pixels of all places and what they are; places beyond the last span hold what was there before.

    `slot` is what has to be given back.
    """

    slot: int
    images_BHWC: Batch
    spans: list[ShardSpan]

    def __len__(self) -> int:
        return sum(len(span.seen) for span in self.spans)


@dataclass
class _PendingSpan:
    """A span that is being read and decoded."""

    shard: Shard
    start: int
    samples: list[Sample] = field(default_factory=list)
    decoding: list[Future[list[SampleInfo]]] = field(default_factory=list)
    handed_over: int = 0
    read_s: float = 0.0
    ends: bool = False
    listed: int = 0

    def result(self) -> ShardSpan:
        """Return the span when all of its samples are decoded."""
        seen = [one for future in self.decoding for one in future.result()]
        return ShardSpan(self.shard, self.start, seen, self.read_s, self.ends, self.listed)


@dataclass
class _Batch:
    """The spans of a batch, of which the last is being filled."""

    slot: int
    spans: list[_PendingSpan] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(span.samples) for span in self.spans)


def buffer_shape(
    preprocessing: Preprocessing, batch_size: int, in_use: int, threads: int
) -> tuple[int, tuple[int, ...]]:
    """Return how many batches a feed needs room for, of which `in_use` are with whoever takes them, and their shape.

    A batch may be one video: enough of them for every thread to decode one and have the next.
    """
    return max(PREFETCH_BATCHES, 2 * threads // batch_size) + in_use, (
        batch_size,
        *eval_transforms.eval_view_shape(preprocessing),
    )


class ShardLoader:
    """Decodes for one scan, in this process.

    Memory: the room for batches that it is given, encoded images for `in_use` batches less, and what `shards.read`
    fetches ahead; whoever takes batches may keep `in_use` of them at a time. Where there is `on_gpu`, it decodes what
    it can, and the CPU the rest.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        columns: SampleFields,
        room: Batch,
        in_use: int,
        threads: int,
        on_gpu: GpuDecoder | None = None,
    ) -> None:
        self._on_gpu = on_gpu
        self._preprocessing, self._columns, self._slots_SBHWC = preprocessing, columns, room
        self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
        self._together = 1 if preprocessing.frames else DECODE_CHUNK
        self._ahead = len(room) - in_use
        self._free: Queue[int] = Queue()
        for slot in range(len(room)):
            self._free.put(slot)

    def batches(self, shards: Iterable[Shard]) -> Generator[DecodedBatch]:
        """Yield batches, decoded, in the order of the shards; every shard ends in a span that says so.

        `shards` is iterated over in the reading thread. Each batch has to be given back. Raises what iterating or
        reading raises, after the batches before it; a shard that is gone is a SemiscaleError.
        """
        waiting: Queue[_Batch | BaseException | None] = Queue(self._ahead)
        stop = threading.Event()
        reader = threading.Thread(target=self._run, args=(shards, waiting, stop), daemon=True)
        reader.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                spans = [span.result() for span in item.spans]
                yield DecodedBatch(item.slot, self._slots_SBHWC[item.slot], spans)
        finally:
            stop.set()
            until = time.monotonic() + SHUTDOWN_TIMEOUT_S
            # It may be waiting for a place in the queue, for a free slot, or for a store that does not answer.
            while reader.is_alive() and time.monotonic() < until:
                self._drain(waiting)
                reader.join(0.01)
            self._drain(waiting)

    def release(self, slot: int) -> None:
        """Take the room of a batch for the next one."""
        self._free.put(slot)

    def _drain(self, waiting: "Queue[_Batch | BaseException | None]") -> None:
        while not waiting.empty():
            item = waiting.get_nowait()
            if isinstance(item, _Batch):
                for span in item.spans:
                    wait(span.decoding)
                self.release(item.slot)

    def _run(self, shards: Iterable[Shard], waiting: "Queue[object]", stop: threading.Event) -> None:
        try:
            for batch in self._filled(shards, stop):
                waiting.put(batch)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked for the batches, which raises it
            waiting.put(error)
        waiting.put(None)

    def _filled(self, shards: Iterable[Shard], stop: threading.Event) -> Iterator[_Batch]:
        """Yield batches that are full, but for the last one, and are being decoded."""
        batch = _Batch(self._free.get())
        try:
            for shard in shards:
                batch.spans.append(_PendingSpan(shard, len(batch)))
                listed = 0
                for sample, seconds in _timed(shard, self._columns):
                    listed += 1
                    if stop.is_set():
                        yield batch
                        return
                    if len(batch) == self._slots_SBHWC.shape[1]:
                        self._hand_over(batch)
                        yield batch
                        batch = _Batch(self._free.get(), [_PendingSpan(shard, 0)])
                    span = batch.spans[-1]
                    span.read_s += seconds
                    span.samples.append(sample)
                    if len(span.samples) - span.handed_over == self._together:
                        self._hand_over(batch)
                self._hand_over(batch)
                batch.spans[-1].ends, batch.spans[-1].listed = True, listed
            yield batch
        except Exception:
            if batch.spans:
                self._hand_over(batch)
            yield batch  # the shards before the one that failed are whole
            raise

    def _hand_over(self, batch: _Batch) -> None:
        """Let a thread decode what the last span has got since."""
        span = batch.spans[-1]
        places = slice(span.start + span.handed_over, span.start + len(span.samples))
        images_BHWC = self._slots_SBHWC[batch.slot][places]
        span.decoding.append(self._pool.submit(self._decode_all, span.samples[span.handed_over :], images_BHWC))
        span.handed_over = len(span.samples)

    def _decode_all(self, samples: list[Sample], images_BHWC: Batch) -> list[SampleInfo]:
        if self._on_gpu is None:
            return list(map(self._decode, samples, images_BHWC))
        started = time.monotonic()
        cuts = self._on_gpu.decode_and_crop([sample.image for sample in samples])
        each_s = (time.monotonic() - started) / max(sum(cut is not None for cut in cuts), 1)
        for image_HWC, cut in zip(images_BHWC, cuts, strict=True):
            if cut is not None:
                image_HWC[:] = cut
        places = zip(samples, images_BHWC, cuts, strict=True)
        return [self._decode(s, image) if cut is None else _sample_info(s, "", each_s) for s, image, cut in places]

    def _decode(self, sample: Sample, image_HWC: Batch) -> SampleInfo:
        if sample.problem:
            return _sample_info(sample, sample.problem, 0.0)
        started = time.monotonic()
        problem = ""
        try:
            image_HWC[:] = eval_transforms.eval_view(sample.image, self._preprocessing)
        except Exception as error:  # noqa: BLE001 - one image in a billion must not end the scan
            problem = describe_decode_error(error, f"{sample.uri}: {sample.key}")
        return _sample_info(sample, problem, time.monotonic() - started)


def _sample_info(sample: Sample, problem: str, seconds: float) -> SampleInfo:
    size_bytes, there = len(sample.image), not sample.problem
    return SampleInfo(sample.index, sample.key, sample.uri, sample.offset, size_bytes, there, problem, seconds)


def _timed(shard: Shard, columns: SampleFields) -> Iterator[tuple[Sample, float]]:
    """Yield a shard's samples, each with the seconds that reading it took."""
    try:
        started = time.monotonic()
        for sample in reader.iter_samples(shard, columns, prefetch=True):
            yield sample, time.monotonic() - started
            started = time.monotonic()
    except FileNotFoundError:
        raise SemiscaleError(
            "SEMI-E272", f"{shard.uri}: The shard disappeared after it was listed. Put it back, or run the plan again."
        ) from None
