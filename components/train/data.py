"""Training batches in an order that depends on the seed and nothing else.

An epoch visits the shards in a random order, a window of them at a time; the samples of a window are shuffled. A set
that fits in one window, as every small one does, is shuffled as a whole and read once.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from queue import Queue

import numpy as np
from numpy.typing import NDArray

from components.shared.decode import Pixels, Undecodable, decode
from components.shared.errors import SemiscaleError
from components.shared.preprocess import RANDOMS, Batch, padded, random_crop, shifted
from components.shared.receipts import Preprocessing
from components.shared.shards import Columns, Sample
from components.shared.splits import LabeledShard

WINDOW_BYTES = 2 << 30  # of encoded images kept in memory and shuffled together
PREFETCH = 2  # batches prepared ahead of the device


@dataclass(frozen=True)
class Picture:
    """One training image in memory: as stored, or already padded where it is tiny."""

    key: str
    image: bytes | Pixels
    label: int


class TrainingData:
    """Yields (images_BHWC, labels_B) forever: epochs follow each other inside a batch, none is cut short.

    Memory: one window of encoded images and PREFETCH batches, whatever the size of the set.
    """

    def __init__(self, shards: list[LabeledShard], columns: Columns, preprocessing: Preprocessing, seed: int) -> None:
        self._shards, self._columns, self._preprocessing, self._seed = shards, columns, preprocessing, seed
        self._windows: dict[tuple[int, ...], list[Picture]] = {}
        self._tiny = preprocessing.augmentation != "crop-flip"
        self.samples = sum(len(shard.labels) for shard in shards)

    def batches(self, batch_size: int, steps: int) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        """Yield `steps` batches, prepared by a thread ahead of the caller."""
        queue: Queue[tuple[Batch, NDArray[np.int64]] | BaseException] = Queue(PREFETCH)
        stop = threading.Event()

        def prepare() -> None:
            try:
                for batch in self._prepared(batch_size, steps):
                    if stop.is_set():
                        return
                    queue.put(batch)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                queue.put(error)

        thread = threading.Thread(target=prepare, daemon=True)
        thread.start()
        try:
            for _ in range(steps):
                batch = queue.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            while not queue.empty():
                queue.get_nowait()

    def _prepared(self, batch_size: int, steps: int) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        pictures = self._stream()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for step in range(steps):
                chosen = list(islice(pictures, batch_size))
                randoms_BR = np.random.default_rng([self._seed, 1, step]).random((batch_size, RANDOMS))
                # A tiny image is cut in a microsecond; a photograph takes milliseconds of decoding, worth a thread.
                cuts = map(self._cut, chosen, randoms_BR) if self._tiny else pool.map(self._cut, chosen, randoms_BR)
                yield np.stack(list(cuts)), np.array([picture.label for picture in chosen], np.int64)

    def _stream(self) -> Iterator[Picture]:
        for epoch in count():
            rng = np.random.default_rng([self._seed, 0, epoch])
            for window in self._windows_of(rng.permutation(len(self._shards))):
                pictures = self._load(window)
                for place in rng.permutation(len(pictures)):
                    yield pictures[place]

    def _windows_of(self, order: NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
        window: list[int] = []
        size = 0
        for number in order.tolist():
            size_bytes = self._shards[number].shard.size_bytes
            if window and size + size_bytes > WINDOW_BYTES:
                yield tuple(sorted(window))
                window, size = [], 0
            window.append(number)
            size += size_bytes
        yield tuple(sorted(window))

    def _load(self, window: tuple[int, ...]) -> list[Picture]:
        if window not in self._windows:
            pairs = (pair for number in window for pair in self._shards[number].read(self._columns))
            self._windows = {window: [self._picture(sample, label) for sample, label in pairs]}
        return self._windows[window]

    def _picture(self, sample: Sample, label: int) -> Picture:
        if not self._tiny:
            return Picture(sample.key, sample.image, label)
        return Picture(sample.key, padded(self._decoded(sample.key, sample.image), self._preprocessing), label)

    def _cut(self, picture: Picture, randoms_R: NDArray[np.float64]) -> Pixels:
        if isinstance(picture.image, bytes):
            return random_crop(self._decoded(picture.key, picture.image), self._preprocessing, randoms_R)
        return shifted(picture.image, self._preprocessing, randoms_R)

    @staticmethod
    def _decoded(key: str, image: bytes) -> Pixels:
        try:
            return decode(image)
        except Undecodable as error:
            raise SemiscaleError(f"{key}: {error}; it was readable when the run was planned, was it changed?") from None
