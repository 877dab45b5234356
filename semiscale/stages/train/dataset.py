"""Training batches in an order that depends on the seed and nothing else.

A set that fits in memory, as every small one does, is read once and shuffled as a whole. A larger one is read anew in
every epoch, along lanes that shuffle a window at a time (lanes.py), the next window while the device works on this one.
Loose files are dealt out at random first, so that a window has images of all class folders; tars and Parquet files are
taken as they are.

Every batch, its order and its random cuts are a function of the seed and the step, so that a training can go on in the
middle of an epoch, and that the ranks of a training need not speak of data: each cuts its own part of every batch.

Beside a GPU all this runs in a process of its own (feed.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from queue import Queue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semiscale.common.cpu import available_cpus
from semiscale.common.errors import SemiscaleError
from semiscale.data.image_decoding import ImageArray, decode_image, describe_decode_error
from semiscale.data.labeled import SHUFFLE_BUFFER_BYTES, LabeledShard
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.data.transforms import (
    CROP_RANDOM_COUNT,
    Batch,
    jpeg_scale_denominator,
    pad_for_shift,
    random_resized_crop,
    random_shift,
    shift_padding,
)
from semiscale.data.video_decoding import decode_train_clip
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.interleaved_order import InterleavedOrder, num_streams

if TYPE_CHECKING:  # it imports torchvision, eight CPU-seconds: for those who use it
    from semiscale.stages.train.augmentation import Augment

FILES_PER_RESHARD = 64  # loose files to a new shard: of one that two lanes share, both read the files
MAX_CONCURRENT_READS = 8  # shards read at a time: hides an object store's latency
PREFETCH_BATCHES = 2  # batches prepared ahead of the device
DECODE_CHUNK = 4  # photographs that a thread is handed at a time


@dataclass(frozen=True)
class TrainSample:
    """One training image in memory: as stored, or already padded where it is tiny."""

    key: str
    image: bytes | ImageArray
    label: int


class TrainingBatch(NamedTuple):
    """One rank's part of a batch."""

    images_BHWC: Batch
    labels_B: NDArray[np.int64]
    keys: list[str]


class TrainDataset:
    """Yields batches forever: epochs follow each other inside a batch, none is cut short.

    Memory: a set of up to WINDOW_BYTES is held whole, on every rank. Of a larger one, whatever its size, all ranks
    together hold two times WINDOW_BYTES, and each an open file for every lane that it reads: 8 MiB of a tar in an
    object store, a row group of a Parquet file. Besides, PREFETCH batches, and those that are being decoded: one, and
    two times TOGETHER images for every thread.

    Reading: N ranks read a larger set once in every epoch, and half a shard more for every lane: the shard that its
    part begins in is read, and passed over, up to there. More ranks than lanes read more: a whole lane each.
    benchmarks/README.md has what that means for the paper's D̂.
    """

    def __init__(
        self,
        shards: list[LabeledShard],
        columns: SampleFields,
        preprocessing: Preprocessing,
        seed: int,
        ranks: DistributedContext,
        augment: "Augment | None" = None,
    ) -> None:
        self._augment = augment
        self._columns, self._preprocessing, self._seed, self._ranks = columns, preprocessing, seed, ranks
        self._together = 1 if preprocessing.frames else DECODE_CHUNK
        self._tiny = not preprocessing.frames and preprocessing.augmentation != "crop-flip"
        self._stopped = False
        self.samples = sum(shard.samples for shard in shards)
        held_bytes = self._held_bytes(shards)
        self._window = self.samples * SHUFFLE_BUFFER_BYTES // max(held_bytes, 1)  # images that are shuffled together
        self._fits = held_bytes <= SHUFFLE_BUFFER_BYTES
        self._shards = shards if self._fits else reshard_loose_files(shards, seed)
        self._whole: list[TrainSample] = []  # the set, where it fits in one window, from its first use on

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of this rank's part of a batch, of images_BHWC, or clips_BTHWC."""
        share, size = self._ranks.batch_slice(batch_size), self._preprocessing.resolution
        frames = [self._preprocessing.frames] if self._preprocessing.frames else []
        return (share.stop - share.start, *frames, size, size, 3)

    def batches(self, batch_size: int, steps: int, after: int = 0) -> Iterator[TrainingBatch]:
        """Yield this rank's part of the batches of steps `after` to `steps`, prepared by a thread ahead of the caller.

        Raises SemiscaleError where an image cannot be read any more.
        """
        queue: Queue[TrainingBatch | BaseException] = Queue(PREFETCH_BATCHES)
        self._stopped = False

        def prepare() -> None:
            try:
                for batch in self._prepared(batch_size, steps, after):
                    if self._stopped:
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
            self._stopped = True
            while not queue.empty():
                queue.get_nowait()

    def _prepared(self, batch_size: int, steps: int, after: int) -> Iterator[TrainingBatch]:
        """Yield this rank's part of the batches; while one is waited for, the threads decode those behind it."""
        mine = self._ranks.batch_slice(batch_size)
        threads = max(available_cpus() // self._ranks.local_count, 1)
        pictures = self._from_memory(batch_size, after) if self._fits else self._from_lanes(batch_size, steps, after)
        decoding: deque[Callable[[], TrainingBatch]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for step, chosen in zip(range(after, steps), pictures, strict=False):
                cut_BR = np.random.default_rng([self._seed, 1, step]).random((batch_size, CROP_RANDOM_COUNT))[mine]
                more = self._augment.randoms if self._augment else 0
                more_BR = np.random.default_rng([self._seed, 4, step]).random((batch_size, more))[mine]
                decoding.append(self._begun(pool, chosen, cut_BR, more_BR))
                if len(decoding) > 1 + 2 * self._together * threads // max(len(chosen), 1):
                    yield decoding.popleft()()
            for result in decoding:
                yield result()

    def _begun(
        self,
        pool: ThreadPoolExecutor,
        chosen: list[TrainSample],
        cut_BR: NDArray[np.float64],
        more_BR: NDArray[np.float64],
    ) -> Callable[[], TrainingBatch]:
        """Begin to prepare a batch; the function that is returned waits for it.

        A tiny image is cut in a microsecond, by whoever waits; a photograph takes milliseconds of decoding, worth a
        thread.
        """
        places = [slice(start, start + self._together) for start in range(0, len(chosen), self._together)]
        parts = [(chosen[part], cut_BR[part], more_BR[part]) for part in places]
        begun = [None if self._tiny else pool.submit(self._prepare_all, *part) for part in parts]

        def result() -> TrainingBatch:
            pairs = zip(begun, parts, strict=True)
            cuts = [cut for one, part in pairs for cut in (one.result() if one else self._prepare_all(*part))]
            labels_B = np.array([picture.label for picture in chosen], np.int64)
            return TrainingBatch(np.stack(cuts), labels_B, [picture.key for picture in chosen])

        return result

    def _from_memory(self, batch_size: int, after: int) -> Iterator[list[TrainSample]]:
        """Yield this rank's pictures of every batch: each epoch shuffles the set as a whole."""
        self._whole = self._whole or self._all()
        epoch, done = divmod(after * batch_size, self.samples)
        orders = (np.random.default_rng([self._seed, 0, number]).permutation(self.samples) for number in count(epoch))
        places = islice((place for order in orders for place in order.tolist()), done, None)
        while True:
            yield [
                self._whole[place] for place in list(islice(places, batch_size))[self._ranks.batch_slice(batch_size)]
            ]

    def _all(self) -> list[TrainSample]:
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            parts = pool.map(lambda shard: [self._picture(*pair) for pair in self._pairs(shard, 0)], self._shards)
            return [picture for part in parts for picture in part]

    def _from_lanes(self, batch_size: int, steps: int, after: int) -> Iterator[list[TrainSample]]:
        """Yield this rank's pictures of every batch, from the lanes that have places in its share."""
        lanes = num_streams(batch_size, len(self._shards))
        window = max(self._window // lanes, 1)
        order = InterleavedOrder(
            self._seed, batch_size, self.samples, lanes, window, self._ranks.batch_slice(batch_size)
        )
        images = range(after * batch_size, steps * batch_size)
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            streams = [
                (_prefetch_windows(self._lane(order, lane, images), pool), places)
                for lane, places in order.slots_per_stream().items()
            ]
            while True:
                yield [picture for stream, places in streams for picture in islice(stream, places)]

    def _lane(self, order: InterleavedOrder, lane: int, images: range) -> Iterator[list[TrainSample]]:
        """Yield this rank's pictures of a lane, in order, a window at a time."""
        epoch = -1
        pairs: Iterator[tuple[Sample, int]] = iter(())
        for window in order.windows(lane, images):
            if self._stopped:  # nobody waits for it any more, but the process would wait before it ends
                return
            if window.epoch != epoch:
                epoch, pairs = window.epoch, self._epoch(window.epoch, window.start)
            shown = set(window.shown.tolist())
            read = {
                number: self._picture(*pair)
                for number, pair in zip(range(window.size), pairs, strict=False)
                if number in shown
            }
            yield [read[number] for number in window.shown.tolist()]

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Sample, int]]:
        """Yield an epoch's samples as its shards are read, from the `start`-th on."""
        for number in np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._shards)).tolist():
            shard = self._shards[number]
            if start < shard.samples:
                yield from self._pairs(shard, start)
            start = max(start - shard.samples, 0)

    def _pairs(self, shard: LabeledShard, start: int) -> Iterator[tuple[Sample, int]]:
        seen = 0
        for seen, pair in enumerate(shard.iter_samples(self._columns), 1):
            if seen > start:
                yield pair
        if seen != shard.samples:
            raise SemiscaleError(
                "SEMI-E242",
                f"{shard.shard.uri}: The shard has {seen} samples, not {shard.samples} as planned. Run the plan again.",
            )

    def _held_bytes(self, shards: list[LabeledShard]) -> int:
        """Return what all samples take in memory: as stored, or as pixels where they are tiny."""
        if not self._tiny:
            return sum(shard.shard.size_bytes for shard in shards)
        side = self._preprocessing.resolution + 2 * shift_padding(self._preprocessing)
        return self.samples * 3 * side**2

    def _picture(self, sample: Sample, label: int) -> TrainSample:
        if not self._tiny:
            return TrainSample(sample.key, sample.image, label)
        return TrainSample(
            sample.key, pad_for_shift(self._decoded(sample.key, sample.image), self._preprocessing), label
        )

    def _prepare_all(
        self, pictures: list[TrainSample], cut_BR: NDArray[np.float64], more_BR: NDArray[np.float64]
    ) -> list[ImageArray]:
        cuts = map(self._cut, pictures, cut_BR)
        return [self._augment(cut, more_R) if self._augment else cut for cut, more_R in zip(cuts, more_BR, strict=True)]

    def _cut(self, picture: TrainSample, randoms_R: NDArray[np.float64]) -> ImageArray:
        if isinstance(picture.image, bytes) and self._preprocessing.frames:
            with _reraise_unreadable(picture.key):
                return decode_train_clip(picture.image, self._preprocessing, randoms_R)
        if isinstance(picture.image, bytes):
            full_size: tuple[int, int] | None = None

            def may_be_reduced(height: int, width: int) -> int:
                nonlocal full_size
                full_size = (height, width)
                return jpeg_scale_denominator(height, width, self._preprocessing, randoms_R)

            image = self._decoded(picture.key, picture.image, may_be_reduced)
            return random_resized_crop(image, self._preprocessing, randoms_R, full_size)
        return random_shift(picture.image, self._preprocessing, randoms_R)

    @staticmethod
    def _decoded(key: str, image: bytes, may: Callable[[int, int], int] = lambda height, width: 1) -> ImageArray:
        with _reraise_unreadable(key):
            return decode_image(image, may)


@contextmanager
def _reraise_unreadable(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        why = f"{key}: {describe_decode_error(error, key)}. The plan could read it. Restore it, or run the plan again."
        raise SemiscaleError("SEMI-E243", why) from error


def _prefetch_windows(windows: Iterator[list[TrainSample]], pool: ThreadPoolExecutor) -> Iterator[TrainSample]:
    """Yield the pictures of windows, the next of which is read meanwhile."""
    loading = pool.submit(next, windows, None)
    while (window := loading.result()) is not None:
        loading = pool.submit(next, windows, None)
        yield from window


def reshard_loose_files(shards: list[LabeledShard], seed: int) -> list[LabeledShard]:
    """Deal the loose files of class folders out at random into new shards; tars and Parquet files stay as they are.

    Class folders are listed class by class. A window of such shards would hold images of a few classes, and a network
    with batch normalisation does not learn from such batches.
    """
    kept = [shard for shard in shards if shard.shard.kind != "files"]
    files = [
        (shard.shard.files[index], label)
        for shard in shards
        if shard.shard.kind == "files"
        for index, label in enumerate(shard.labels.tolist())
        if label >= 0
    ]
    order = np.random.default_rng([seed, 2]).permutation(len(files)).tolist()
    for start in range(0, len(files), FILES_PER_RESHARD):
        chosen = [files[place] for place in order[start : start + FILES_PER_RESHARD]]
        shard = Shard(
            uri="",
            name=f"dealt-{start // FILES_PER_RESHARD:06}",
            kind="files",
            size_bytes=sum(file.size_bytes for file, _ in chosen),
            version="",
            files=[file for file, _ in chosen],
        )
        kept.append(LabeledShard(shard, np.array([label for _, label in chosen], np.int32)))
    return kept
