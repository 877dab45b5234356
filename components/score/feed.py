"""Images ahead of the model: one thread reads shard after shard, many decode into preallocated batches, the model never
waits for an allocation.

A batch is filled across the shards' ends, so that small shards cost the model no more than large ones. Every image has
its place in its batch, decoded or not, so that nothing depends on which thread was first.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import Queue

import numpy as np
import torch

from components.score.gpu_decode import GpuDecoder
from components.shared import shards as sharding
from components.shared import views
from components.shared.cores import cores
from components.shared.decode import reason
from components.shared.errors import SemiscaleError
from components.shared.preprocess import Batch
from components.shared.receipts import Preprocessing
from components.shared.shards import Columns, Sample, Shard

TOGETHER = 8  # images that a thread is handed at a time: handing over costs as much as a twentieth of decoding one
STOPPING_S = 5.0  # that a read under way is waited for, when the scan stops
AHEAD = 4  # batches decoded or being decoded while the model works on others


@dataclass(frozen=True)
class Decoded:
    """What became of one sample: why there are no pixels ("" where there are), and the seconds that it took."""

    problem: str
    seconds: float


@dataclass
class Span:
    """Neighbouring places of a batch that belong to one shard; `ends` where they are its last, and then `listed` is how
    many samples were read of the whole shard."""

    shard: Shard
    start: int
    samples: list[Sample] = field(default_factory=list)
    decoding: list[Future[list[Decoded]]] = field(default_factory=list)
    handed_over: int = 0
    read_s: float = 0.0
    ends: bool = False
    listed: int = 0

    @property
    def places(self) -> slice:
        """Where in the batch the samples are."""
        return slice(self.start, self.start + len(self.samples))

    def decoded(self) -> list[Decoded]:
        """Return what became of each sample; waits for those that are being decoded."""
        return [one for future in self.decoding for one in future.result()]


@dataclass(frozen=True)
class Prepared:
    """One batch: the pixels of all places and what they are; places beyond the last span hold what was there before."""

    images_BHWC: Batch
    spans: list[Span]

    def __len__(self) -> int:
        return sum(len(span.samples) for span in self.spans)


class Feed:
    """Decodes for one scan.

    Memory: AHEAD + `in_use` batches of pixels, as many of encoded images, and what `shards.read` fetches ahead; whoever
    takes batches may keep `in_use` of them at a time. `allocate` makes a batch of a shape, in memory that the device
    can fetch from. Where there is `on_gpu`, it decodes what it can, and the CPU the rest.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        columns: Columns,
        batch_size: int,
        in_use: int,
        allocate: Callable[[tuple[int, ...]], Batch] = lambda shape: np.zeros(shape, np.uint8),
        on_gpu: GpuDecoder | None = None,
    ) -> None:
        self._on_gpu = on_gpu
        self._preprocessing, self._columns, self._batch_size = preprocessing, columns, batch_size
        self._pool = ThreadPoolExecutor(cores(), "decode", torch.set_num_threads, (1,))
        self._together = 1 if preprocessing.frames else TOGETHER
        # A batch may be one video: enough of them for every core to decode one and have the next.
        self._ahead = max(AHEAD, 2 * cores() // batch_size)
        self._free: Queue[Batch] = Queue()
        for _ in range(self._ahead + in_use):
            self._free.put(allocate((batch_size, *views.shape(preprocessing))))

    def batches(self, shards: Iterable[Shard]) -> Generator[Prepared]:
        """Yield batches, decoded, in the order of the shards; every shard ends in a span that says so.

        `shards` is iterated over in the reading thread. Each batch has to be given back. Raises what iterating or
        reading raises, after the batches before it; a shard that is gone is a SemiscaleError.
        """
        waiting: Queue[Prepared | BaseException | None] = Queue(self._ahead)
        stop = threading.Event()
        reader = threading.Thread(target=self._run, args=(shards, waiting, stop), daemon=True)
        reader.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                for span in item.spans:
                    span.decoded()
                yield item
        finally:
            stop.set()
            until = time.monotonic() + STOPPING_S
            # It may be waiting for a place in the queue, for a free batch, or for a store that does not answer.
            while reader.is_alive() and time.monotonic() < until:
                self._drain(waiting)
                reader.join(0.01)
            self._drain(waiting)

    def give_back(self, batch: Prepared) -> None:
        """Take the pixels of a batch for the next one."""
        self._free.put(batch.images_BHWC)

    def _drain(self, waiting: "Queue[Prepared | BaseException | None]") -> None:
        while not waiting.empty():
            item = waiting.get_nowait()
            if isinstance(item, Prepared):
                for span in item.spans:
                    wait(span.decoding)
                self.give_back(item)

    def _run(self, shards: Iterable[Shard], waiting: "Queue[object]", stop: threading.Event) -> None:
        try:
            for batch in self._filled(shards, stop):
                waiting.put(batch)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked for the batches, which raises it
            waiting.put(error)
        waiting.put(None)

    def _filled(self, shards: Iterable[Shard], stop: threading.Event) -> Iterator[Prepared]:
        """Yield batches that are full, but for the last one, and are being decoded."""
        batch = Prepared(self._free.get(), [])
        try:
            for shard in shards:
                batch.spans.append(Span(shard, len(batch)))
                listed = 0
                for sample, seconds in _timed(shard, self._columns):
                    listed += 1
                    if stop.is_set():
                        yield batch
                        return
                    if len(batch) == self._batch_size:
                        self._hand_over(batch)
                        yield batch
                        batch = Prepared(self._free.get(), [Span(shard, 0)])
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

    def _hand_over(self, batch: Prepared) -> None:
        """Let a thread decode what the last span has got since."""
        span = batch.spans[-1]
        samples, images_BHWC = span.samples[span.handed_over :], batch.images_BHWC[span.places][span.handed_over :]
        span.handed_over = len(span.samples)
        span.decoding.append(self._pool.submit(self._decode_all, samples, images_BHWC))

    def _decode_all(self, samples: list[Sample], images_BHWC: Batch) -> list[Decoded]:
        if self._on_gpu is None:
            return list(map(self._decode, samples, images_BHWC))
        started = time.monotonic()
        cuts = self._on_gpu.cut([sample.image for sample in samples])
        each = Decoded("", (time.monotonic() - started) / max(sum(cut is not None for cut in cuts), 1))
        for image_HWC, cut in zip(images_BHWC, cuts, strict=True):
            if cut is not None:
                image_HWC[:] = cut
        places = zip(samples, images_BHWC, cuts, strict=True)
        return [self._decode(sample, image) if cut is None else each for sample, image, cut in places]

    def _decode(self, sample: Sample, image_HWC: Batch) -> Decoded:
        if sample.problem:
            return Decoded(sample.problem, 0.0)
        started = time.monotonic()
        try:
            image_HWC[:] = views.view(sample.image, self._preprocessing)
        except Exception as error:  # noqa: BLE001 - one image in a billion must not end the scan
            return Decoded(reason(error, f"{sample.uri}: {sample.key}"), time.monotonic() - started)
        return Decoded("", time.monotonic() - started)


def _timed(shard: Shard, columns: Columns) -> Iterator[tuple[Sample, float]]:
    """Yield a shard's samples, each with the seconds that reading it took."""
    try:
        started = time.monotonic()
        for sample in sharding.read(shard, columns, ahead=True):
            yield sample, time.monotonic() - started
            started = time.monotonic()
    except FileNotFoundError:
        raise SemiscaleError(f"{shard.uri}: gone since it was listed; put it back, or run the plan again") from None
