"""The order of a training set that is larger than memory.

Every epoch puts the shards in a random order and divides their samples, one after the other, among the streams. Each
batch is divided into equal slices, one for each stream. A stream always fills its own slice with samples from its own
part of the epoch, shuffled within a window.

Every sample of an epoch is used exactly once. Epoch e consists of the images e x samples to (e + 1) x samples of the
training, wherever batches begin. The part of a stream is as long as the slots that the stream has among these images.
It begins where the parts of the streams before it end. Therefore batches need not divide the epoch, and streams need
not divide the batch.

The streams, and so the order, depend on the batch size and on the set. They do not depend on the ranks. N ranks make
up the batches that a single process would, and a training can be resumed with another number of ranks. The slice of a
rank consists of neighbouring streams, so each of N ranks reads an N-th of the set. If the ranks do not divide the
streams, two ranks read the stream at their border, and each keeps its own samples.

The window of a stream holds neighbouring samples of a shard. A batch mixes as many images as the windows of all
streams hold, but the part of a rank only those of its own streams. A packed set is in random order already. Do not
train from tars that hold one class each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The paper trains with 64 ranks. Each stream of a rank keeps a file open.
MAX_STREAMS = 64


class ShuffleWindow(NamedTuple):
    """Neighbouring samples of an epoch that are shuffled together.

    Attributes:
        epoch: Number of the epoch.
        start: First sample, counted in the epoch's order of reading.
        size: Number of samples.
        chosen: Samples of the window that this rank uses, in order of use.
    """

    epoch: int
    start: int
    size: int
    chosen: NDArray[np.int64]


@dataclass(frozen=True)
class InterleavedOrder:
    """The streams of one rank.

    Attributes:
        seed: Seed of the training.
        batch_size: Images of a batch, over all ranks.
        num_samples: Samples of the set.
        num_streams: Number of streams.
        window_size: Samples of a stream that are shuffled together.
        batch_slice: Slots of a batch that this rank fills. Only `chosen` of a window depends on it.
    """

    seed: int
    batch_size: int
    num_samples: int
    num_streams: int
    window_size: int
    batch_slice: slice

    def slots_per_stream(self) -> dict[int, int]:
        """Return how many slots of a batch this rank fills from each of its streams, in order."""
        edges = [self._first_slot(stream) for stream in range(self.num_streams + 1)]
        slots = {
            stream: min(high, self.batch_slice.stop) - max(low, self.batch_slice.start)
            for stream, (low, high) in enumerate(pairwise(edges))
        }
        return {stream: number for stream, number in slots.items() if number > 0}

    def windows(self, stream: int, images: range) -> Iterator[ShuffleWindow]:
        """Yield the windows of a stream in order.

        Args:
            stream: Number of the stream.
            images: Images of the training. Windows without any of them are left out.
        """
        begin, end = self._count_of_stream(stream, images.start), self._count_of_stream(stream, images.stop)
        for epoch in count(images.start // self.num_samples):
            first, last = (self._count_of_stream(stream, number * self.num_samples) for number in (epoch, epoch + 1))
            skipped = max(begin - first, 0) // self.window_size * self.window_size
            for at in range(first + skipped, min(last, end), self.window_size):
                order = np.random.default_rng([self.seed, 5, stream, at]).permutation(min(self.window_size, last - at))
                # Positions in the stream, over the whole training.
                position = at + np.arange(len(order))
                chosen = order[(position >= begin) & (position < end) & self._is_own(stream, position)]
                yield ShuffleWindow(epoch, self._start_in_epoch(stream, epoch) + at - first, len(order), chosen)
            if last >= end:
                return

    def _is_own(self, stream: int, position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which positions of a stream this rank fills. They are all, unless two ranks share the stream."""
        low, high = self._first_slot(stream), self._first_slot(stream + 1)
        slot = low + position % (high - low)
        own: NDArray[np.bool_] = (slot >= self.batch_slice.start) & (slot < self.batch_slice.stop)
        return own

    def _first_slot(self, stream: int) -> int:
        return stream * self.batch_size // self.num_streams

    def _start_in_epoch(self, stream: int, epoch: int) -> int:
        """Count the samples of an epoch that belong to earlier streams."""
        before, after = (
            self._count_below(self._first_slot(stream), number * self.num_samples) for number in (epoch, epoch + 1)
        )
        return after - before

    def _count_of_stream(self, stream: int, images: int) -> int:
        """Count the images of a stream among the first `images` of the training."""
        first, end = self._first_slot(stream), self._first_slot(stream + 1)
        return self._count_below(end, images) - self._count_below(first, images)

    def _count_below(self, slot: int, images: int) -> int:
        """Count the images at slots below `slot` of their batch, among the first `images` of the training."""
        return images // self.batch_size * slot + min(images % self.batch_size, slot)


def num_streams(batch_size: int, shards: int) -> int:
    """Return the number of streams of a training.

    It is a power of two, as the number of ranks often is.

    Args:
        batch_size: Images of a batch. A stream fills at least one slot.
        shards: Number of shards. There are no more streams than shards.
    """
    return 1 << min(MAX_STREAMS, batch_size, shards).bit_length() - 1
