"""Read the samples of a training set in the order of training.

Every order is a function of the seed and the step. A training can therefore resume in the middle of an epoch, and its
ranks exchange nothing about the data.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, count, islice
from threading import BoundedSemaphore

import numpy as np

from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import map_prefetched, prefetch
from semiscale.data.image_decoding import ImageArray
from semiscale.data.labeled import LabeledShard
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.interleaved_order import InterleavedOrder, num_streams

# Loose files of a new shard. If two streams share a shard, both read its files.
FILES_PER_RESHARD = 64
# Shards that are read at a time, which hides the latency of an object store.
MAX_CONCURRENT_READS = 8


@dataclass(frozen=True)
class TrainSample:
    """One training sample in memory.

    Attributes:
        key: Key of the sample.
        image: Encoded image or video, or the padded pixels of a tiny image.
        label: Number of its class.
    """

    key: str
    image: bytes | ImageArray
    label: int


# Makes the form in which a sample is kept in memory, from the sample and its label.
MakeSample = Callable[[Sample, int], TrainSample]


@dataclass(eq=False)
class SampleSource(ABC):
    """A training set that is read in the order of training.

    Attributes:
        shards: Shards of the set.
        columns: Names of the columns or keys.
        seed: Seed of the training.
        ranks: This rank among all.
        make_sample: Makes the form in which samples are kept.
    """

    shards: list[LabeledShard]
    columns: SampleFields
    seed: int
    ranks: DistributedContext
    make_sample: MakeSample

    @abstractmethod
    def batches(self, batch_size: int, steps: int, after: int) -> Generator[list[TrainSample]]:
        """Yield this rank's samples of each batch.

        Args:
            batch_size: Images of a batch, over all ranks.
            steps: Last step.
            after: Step after which the batches begin.

        Raises:
            SemiscaleError: A shard has changed since the plan, or a sample cannot be read.
        """


@dataclass(eq=False)
class InMemorySource(SampleSource):
    """A set that fits in memory. It is read once, and each epoch shuffles it as a whole.

    Cost:
        Memory for all samples, from the first batch on.
    """

    _samples: list[TrainSample] = field(default_factory=list, init=False)

    def batches(self, batch_size: int, steps: int, after: int) -> Generator[list[TrainSample]]:
        """Yield this rank's samples of each batch. See SampleSource."""
        if not self._samples:
            with closing(map_prefetched(self._read_shard, self.shards, MAX_CONCURRENT_READS)) as parts:
                self._samples = [sample for part in parts for sample in part]
        epoch, done = divmod(after * batch_size, len(self._samples))
        orders = (
            np.random.default_rng([self.seed, 0, number]).permutation(len(self._samples)) for number in count(epoch)
        )
        indexes = islice((index for order in orders for index in order.tolist()), done, None)
        batch_slice = self.ranks.batch_slice(batch_size)
        for _ in range(after, steps):
            yield [self._samples[index] for index in list(islice(indexes, batch_size))[batch_slice]]

    def _read_shard(self, shard: LabeledShard) -> list[TrainSample]:
        return [self.make_sample(*pair) for pair in _iter_planned_samples(shard, self.columns)]


@dataclass(eq=False)
class StreamingSource(SampleSource):
    """A set that is larger than memory. It is read once in each epoch, in interleaved streams.

    Loose files are distributed over new shards first, so that a window has images of all class folders. Tars and
    Parquet files are read as they are. See interleaved_order.py for the order.

    Attributes:
        shuffle_buffer: Samples that are shuffled together, over all streams.

    Cost:
        All ranks together hold twice `shuffle_buffer` samples. Each rank holds an open file for each stream that it
        reads: 8 MiB of a tar in an object store, or a row group of a Parquet file. N ranks read the set once in each
        epoch, and half a shard more for each stream, because a stream begins within a shard. More ranks than streams
        each read a whole stream.
    """

    shuffle_buffer: int

    def __post_init__(self) -> None:
        self.shards = reshard_loose_files(self.shards, self.seed)

    def batches(self, batch_size: int, steps: int, after: int) -> Generator[list[TrainSample]]:
        """Yield this rank's samples of each batch. See SampleSource.

        While a window is used, the next one of its stream is read.
        """
        streams = num_streams(batch_size, len(self.shards))
        order = InterleavedOrder(
            seed=self.seed,
            batch_size=batch_size,
            num_samples=sum(shard.samples for shard in self.shards),
            num_streams=streams,
            window_size=max(self.shuffle_buffer // streams, 1),
            batch_slice=self.ranks.batch_slice(batch_size),
        )
        images = range(after * batch_size, steps * batch_size)
        reads = BoundedSemaphore(MAX_CONCURRENT_READS)
        with ExitStack() as stack:
            own_streams: list[tuple[Iterator[TrainSample], int]] = []
            for stream, slots in order.slots_per_stream().items():
                windows = stack.enter_context(closing(prefetch(self._read_windows(order, stream, images, reads))))
                own_streams.append((chain.from_iterable(windows), slots))
            for _ in range(after, steps):
                yield [sample for samples, slots in own_streams for sample in islice(samples, slots)]

    def _read_windows(
        self, order: InterleavedOrder, stream: int, images: range, reads: BoundedSemaphore
    ) -> Generator[list[TrainSample]]:
        """Yield the samples of each window of a stream, in the order of their use."""
        epoch = -1
        pairs: Iterator[tuple[Sample, int]] = iter(())
        for window in order.windows(stream, images):
            with reads:
                if window.epoch != epoch:
                    epoch, pairs = window.epoch, self._read_epoch(window.epoch, window.start)
                # Samples that another rank uses are read and dropped at once.
                chosen = set(window.chosen.tolist())
                samples = {
                    number: self.make_sample(*pair)
                    for number, pair in zip(range(window.size), pairs, strict=False)
                    if number in chosen
                }
            yield [samples[number] for number in window.chosen.tolist()]

    def _read_epoch(self, epoch: int, start: int) -> Iterator[tuple[Sample, int]]:
        """Yield the samples of an epoch from the `start`-th on, in the order of reading."""
        for number in np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.shards)).tolist():
            shard = self.shards[number]
            if start < shard.samples:
                yield from _iter_planned_samples(shard, self.columns, start)
            start = max(start - shard.samples, 0)


def _iter_planned_samples(shard: LabeledShard, columns: SampleFields, start: int = 0) -> Iterator[tuple[Sample, int]]:
    """Yield the samples of a shard from the `start`-th on, and check that they are as many as planned."""
    samples = 0
    for samples, pair in enumerate(shard.iter_samples(columns), 1):
        if samples > start:
            yield pair
    if samples != shard.samples:
        raise SemiscaleError(
            "SEMI-E242",
            f"{shard.shard.uri}: The shard has {samples} samples, not {shard.samples} as planned. Run the plan again.",
        )


def reshard_loose_files(shards: list[LabeledShard], seed: int) -> list[LabeledShard]:
    """Distribute the loose files of class folders over new shards at random. Tars and Parquet files stay as they are.

    Class folders are listed class by class. A window of such shards would hold images of a few classes. A network with
    batch normalization does not learn from such batches.

    Args:
        shards: Shards of a set.
        seed: Seed of the distribution.
    """
    resharded = [shard for shard in shards if shard.shard.kind != "files"]
    files = [
        (shard.shard.files[index], label)
        for shard in shards
        if shard.shard.kind == "files"
        for index, label in enumerate(shard.labels.tolist())
        if label >= 0
    ]
    order = np.random.default_rng([seed, 2]).permutation(len(files)).tolist()
    for start in range(0, len(files), FILES_PER_RESHARD):
        chosen = [files[index] for index in order[start : start + FILES_PER_RESHARD]]
        shard = Shard(
            uri="",
            name=f"dealt-{start // FILES_PER_RESHARD:06}",
            kind="files",
            size_bytes=sum(file.size_bytes for file, _ in chosen),
            version="",
            files=[file for file, _ in chosen],
        )
        resharded.append(LabeledShard(shard, np.array([label for _, label in chosen], np.int32)))
    return resharded
