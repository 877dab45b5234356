"""Training batches in an order that depends on the seed and nothing else.

An epoch visits the shards in a random order, a window of them at a time; the samples of a window are shuffled. A set
that fits in one window, as every small one does, is shuffled as a whole and read once; of a larger one the next window
is read while the device works on this one. Loose files are dealt out at random first, so that a window has images of
all class folders; tars and Parquet files are taken as they are.

Every batch, its order and its random cuts are a function of the seed and the step, so that a training can go on in the
middle of an epoch, and that the ranks of a training need not speak of data: each cuts its own part of every batch.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice, pairwise
from queue import Queue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from components.shared.cores import cores
from components.shared.decode import Pixels, decode, reason
from components.shared.errors import SemiscaleError
from components.shared.preprocess import RANDOMS, Batch, padded, random_crop, reduction, shifted
from components.shared.receipts import Preprocessing
from components.shared.shards import FILES_PER_SHARD, Columns, Sample, Shard
from components.shared.splits import LabeledShard
from components.train.ranks import Ranks

if TYPE_CHECKING:  # it imports torchvision, eight CPU-seconds: for those who use it
    from components.train.augment import Augment

WINDOW_BYTES = 1 << 30  # of encoded images that are shuffled together; this window and the next are in memory
READERS = 8  # shards read at a time: hides an object store's latency
PREFETCH = 2  # batches prepared ahead of the device


@dataclass(frozen=True)
class Picture:
    """One training image in memory: as stored, or already padded where it is tiny."""

    key: str
    image: bytes | Pixels
    label: int


class TrainingBatch(NamedTuple):
    """One rank's part of a batch."""

    images_BHWC: Batch
    labels_B: NDArray[np.int64]
    keys: list[str]


class _Visit(NamedTuple):
    """A window and the order that its samples are shown in; `first` is the place of the first in the whole training."""

    window: tuple[int, ...]
    order: NDArray[np.int64]
    first: int


class TrainingData:
    """Yields batches forever: epochs follow each other inside a batch, none is cut short.

    Memory: two windows of encoded images and PREFETCH batches, whatever the size of the set; of a set that is larger
    than a window, each rank keeps its own samples only. Every rank reads the whole set: N ranks read N times its size
    from an object store in every epoch.
    """

    def __init__(
        self,
        shards: list[LabeledShard],
        columns: Columns,
        preprocessing: Preprocessing,
        seed: int,
        ranks: Ranks,
        augment: "Augment | None" = None,
    ) -> None:
        self._augment = augment
        self._columns, self._preprocessing, self._seed, self._ranks = columns, preprocessing, seed, ranks
        fits = sum(shard.shard.size_bytes for shard in shards) <= WINDOW_BYTES
        self._shards = shards if fits else dealt(shards, seed)
        self._whole: list[Picture] | None = None  # the set, where it fits in one window
        self._fits = fits
        self._tiny = preprocessing.augmentation != "crop-flip"
        self._stop = threading.Event()
        self.samples = sum(len(shard.labels) for shard in shards)

    def batches(self, batch_size: int, steps: int, after: int = 0) -> Iterator[TrainingBatch]:
        """Yield this rank's part of the batches of steps `after` to `steps`, prepared by a thread ahead of the caller.

        Raises SemiscaleError where an image cannot be read any more.
        """
        queue: Queue[TrainingBatch | BaseException] = Queue(PREFETCH)
        self._stop.clear()

        def prepare() -> None:
            try:
                for batch in self._prepared(batch_size, steps, after):
                    if self._stop.is_set():
                        return
                    queue.put(batch)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                queue.put(error)

        thread = threading.Thread(target=prepare, daemon=True)
        thread.start()
        try:
            for _ in range(after, steps):
                batch = queue.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            self._stop.set()
            while not queue.empty():
                queue.get_nowait()

    def _prepared(self, batch_size: int, steps: int, after: int) -> Iterator[TrainingBatch]:
        mine = self._ranks.share(batch_size)
        threads = max(cores() // self._ranks.local_count, 1)
        pictures = self._stream(range(after * batch_size, steps * batch_size), batch_size)
        with ThreadPoolExecutor(threads) as pool:
            for step in range(after, steps):
                chosen = [picture for picture in list(islice(pictures, batch_size))[mine] if picture]
                cut_BR = np.random.default_rng([self._seed, 1, step]).random((batch_size, RANDOMS))[mine]
                more = self._augment.randoms if self._augment else 0
                more_BR = np.random.default_rng([self._seed, 4, step]).random((batch_size, more))[mine]
                # A tiny image is cut in a microsecond; a photograph takes milliseconds of decoding, worth a thread.
                each = map if self._tiny else pool.map
                cuts = each(self._prepare, chosen, cut_BR, more_BR)
                labels_B = np.array([picture.label for picture in chosen], np.int64)
                yield TrainingBatch(np.stack(list(cuts)), labels_B, [picture.key for picture in chosen])

    def _stream(self, images: range, batch_size: int) -> Iterator[Picture | None]:
        """Yield the training's pictures at these places in its order, None for what other ranks cut."""
        visits = self._visits(images)
        with ThreadPoolExecutor(1) as ahead:
            visit = next(visits, None)
            loading = ahead.submit(self._load, visit, batch_size)
            while visit:
                pictures = loading.result()
                following = next(visits, None)
                loading = ahead.submit(self._load, following, batch_size)
                yield from (pictures[place] for place in visit.order[max(images.start - visit.first, 0) :].tolist())
                visit = following

    def _visits(self, images: range) -> Iterator[_Visit]:
        """Yield the windows in their order, without those that end before or begin after these places."""
        for epoch in count(images.start // self.samples):
            first = epoch * self.samples
            rng = np.random.default_rng([self._seed, 0, epoch])
            for window in self._windows_of(rng.permutation(len(self._shards))):
                if first >= images.stop:
                    return
                order = rng.permutation(sum(len(self._shards[number].labels) for number in window))
                if first + len(order) > images.start:
                    yield _Visit(window, order, first)
                first += len(order)

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

    def _load(self, visit: _Visit | None, batch_size: int) -> list[Picture | None]:
        if visit is None:
            return []
        if self._fits:
            self._whole = self._whole or [picture for picture in self._read(visit.window, None) if picture]
            return list(self._whole)
        places = (visit.first + np.argsort(visit.order)) % batch_size  # of each sample in its batch
        mine = self._ranks.share(batch_size)
        return self._read(visit.window, (places >= mine.start) & (places < mine.stop))

    def _read(self, window: tuple[int, ...], keep_B: NDArray[np.bool_] | None) -> list[Picture | None]:
        ends = np.cumsum([0, *(len(self._shards[number].labels) for number in window)])
        keeps = [None if keep_B is None else keep_B[start:end] for start, end in pairwise(ends)]
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(self._shard, (self._shards[number] for number in window), keeps))
        return [picture for part in parts for picture in part]

    def _shard(self, shard: LabeledShard, keep_B: NDArray[np.bool_] | None) -> list[Picture | None]:
        if self._stop.is_set():  # nobody waits for it any more, but the process would wait before it ends
            return []
        pictures = [
            self._picture(sample, label) if keep_B is None or keep_B[place] else None
            for place, (sample, label) in enumerate(shard.read(self._columns))
        ]
        if len(pictures) != len(shard.labels):
            raise SemiscaleError(f"{shard.shard.uri}: {len(pictures)} samples where {len(shard.labels)} were planned")
        return pictures

    def _picture(self, sample: Sample, label: int) -> Picture:
        if not self._tiny:
            return Picture(sample.key, sample.image, label)
        return Picture(sample.key, padded(self._decoded(sample.key, sample.image), self._preprocessing), label)

    def _prepare(self, picture: Picture, cut_R: NDArray[np.float64], more_R: NDArray[np.float64]) -> Pixels:
        cut = self._cut(picture, cut_R)
        return self._augment(cut, more_R) if self._augment else cut

    def _cut(self, picture: Picture, randoms_R: NDArray[np.float64]) -> Pixels:
        if isinstance(picture.image, bytes):
            full_size: tuple[int, int] | None = None

            def may_be_reduced(height: int, width: int) -> int:
                nonlocal full_size
                full_size = (height, width)
                return reduction(height, width, self._preprocessing, randoms_R)

            image = self._decoded(picture.key, picture.image, may_be_reduced)
            return random_crop(image, self._preprocessing, randoms_R, full_size)
        return shifted(picture.image, self._preprocessing, randoms_R)

    @staticmethod
    def _decoded(key: str, image: bytes, may: Callable[[int, int], int] = lambda height, width: 1) -> Pixels:
        try:
            return decode(image, may)
        except Exception as error:
            why = f"{key}: {reason(error, key)}; it was readable when the run was planned, was it changed?"
            raise SemiscaleError(why) from error


def dealt(shards: list[LabeledShard], seed: int) -> list[LabeledShard]:
    """Deal the loose files of class folders out at random into new shards; tars and Parquet files stay as they are.

    Class folders are listed class by class. A window of such shards would hold images of a few classes, and a network
    with batch normalisation does not learn from such batches.
    """
    kept = [shard for shard in shards if shard.shard.kind != "files"]
    files = [
        (shard.shard.files[index], label)
        for shard in shards
        if shard.shard.kind == "files"
        for index, label in shard.labels.items()
    ]
    order = np.random.default_rng([seed, 2]).permutation(len(files)).tolist()
    for start in range(0, len(files), FILES_PER_SHARD):
        chosen = [files[place] for place in order[start : start + FILES_PER_SHARD]]
        shard = Shard(
            uri="",
            name=f"dealt-{start // FILES_PER_SHARD:06}",
            kind="files",
            size_bytes=sum(file.size_bytes for file, _ in chosen),
            version="",
            files=[file for file, _ in chosen],
        )
        kept.append(LabeledShard(shard, {index: label for index, (_, label) in enumerate(chosen)}))
    return kept
