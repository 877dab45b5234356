"""Images ahead of the model: one thread reads a shard, many decode into preallocated batches, the model never waits for
an allocation.

Every image has its place in its batch, decoded or not, so that nothing depends on which thread was first.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import Queue

import numpy as np

from components.shared import shards as sharding
from components.shared.decode import Undecodable, decode
from components.shared.preprocess import Batch, fixed_cut
from components.shared.receipts import Preprocessing
from components.shared.shards import Columns, Sample, Shard

AHEAD = 4  # batches decoded or being decoded while the model works on another


@dataclass(frozen=True)
class Prepared:
    """One batch: its samples, the pixels of all places, and for each sample why it has none ("" where it has)."""

    samples: list[Sample]
    images_BHWC: Batch
    problems: list[str]


class Feed:
    """Decodes for one scan. `read_s` and `decode_s` count thread-seconds.

    Memory: AHEAD + 2 batches of pixels, and as many of encoded images.
    """

    def __init__(self, preprocessing: Preprocessing, columns: Columns, batch_size: int) -> None:
        self._preprocessing, self._columns = preprocessing, columns
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        shape = (batch_size, preprocessing.resolution, preprocessing.resolution, 3)
        self._free: Queue[Batch] = Queue()
        for _ in range(AHEAD + 2):
            self._free.put(np.zeros(shape, np.uint8))
        self.read_s = self.decode_s = 0.0
        self._lock = threading.Lock()

    def batches(self, shard: Shard) -> Iterator[Prepared]:
        """Yield a shard's batches in order. The pixels of one are valid until the next is asked for.

        Raises what reading the shard raises, after the batches before it.
        """
        waiting: Queue[tuple[list[Sample], Batch, list[Future[str]]] | Exception | None] = Queue(AHEAD)
        stop = threading.Event()
        reader = threading.Thread(target=self._read, args=(shard, waiting, stop), daemon=True)
        reader.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                samples, images_BHWC, decoding = item
                yield Prepared(samples, images_BHWC, [future.result() for future in decoding])
                self._free.put(images_BHWC)
        finally:
            stop.set()
            while reader.is_alive():  # it may be waiting for a place in the queue or for a free batch
                self._drain(waiting)
                reader.join(0.01)
            self._drain(waiting)

    def _drain(self, waiting: "Queue[tuple[list[Sample], Batch, list[Future[str]]] | Exception | None]") -> None:
        while not waiting.empty():
            item = waiting.get_nowait()
            if isinstance(item, tuple):
                for future in item[2]:
                    future.result()
                self._free.put(item[1])

    def _read(self, shard: Shard, waiting: "Queue[object]", stop: threading.Event) -> None:
        try:
            samples = sharding.read(shard, self._columns)
            while not stop.is_set():
                images_BHWC = self._free.get()
                started = time.monotonic()
                batch = list(islice(samples, len(images_BHWC)))
                self.read_s += time.monotonic() - started
                if not batch:
                    self._free.put(images_BHWC)
                    break
                decoding = [
                    self._pool.submit(self._decode, sample, images_BHWC, place) for place, sample in enumerate(batch)
                ]
                waiting.put((batch, images_BHWC, decoding))
        except Exception as error:  # noqa: BLE001 - handed to the thread that asked for the batches, which raises it
            waiting.put(error)
        waiting.put(None)

    def _decode(self, sample: Sample, images_BHWC: Batch, place: int) -> str:
        if sample.problem:
            return sample.problem
        started = time.monotonic()
        try:
            images_BHWC[place] = fixed_cut(decode(sample.image), self._preprocessing)
        except Undecodable as error:
            return str(error)
        finally:
            with self._lock:
                self.decode_s += time.monotonic() - started
        return ""
