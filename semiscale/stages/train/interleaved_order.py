"""The order in which a training sees a set that is larger than memory, cut so that its ranks read it once together.

Every epoch puts the shards in a random order and cuts their samples, one after the other, into a part for every lane.
Lane j of L fills the same places of every batch, the j-th of L equal parts of it, with the samples of its own part,
shuffled a window at a time. A rank's share of a batch is some neighbouring lanes: N ranks read an N-th of the set each.

Why every sample of an epoch is seen exactly once: epoch e is the images e x samples to (e + 1) x samples of the
training, wherever batches begin. A lane's part is as long as the places that it has among them, and begins where the
parts of the lanes before it end. Batches need not divide the epoch, nor lanes the batch.

The lanes depend on the batch and on the set, not on the ranks, and so does the order: the ranks make up the batches
that one process would, and another number of them can go on. Where ranks do not divide the lanes, two of them read the
lane at their border, and each keeps its own.

A window of one lane is some neighbours of a shard, a 64th of WINDOW_BYTES: a batch mixes as many images as the windows
of all lanes hold, but a rank's part of it only those of its lanes. A packed set is in random order already; a set that
is stored class by class is not to be trained on from tars of one class each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_STREAMS = 64  # at most: the ranks of the paper, and the open files of a training in one process


class ShuffleWindow(NamedTuple):
    """`size` samples of an epoch, from the `start`-th on; this rank shows those numbered `shown`, in this order."""

    epoch: int
    start: int
    size: int
    shown: NDArray[np.int64]


@dataclass(frozen=True)
class InterleavedOrder:
    """The lanes of one rank, whose places in every batch are `share`; `window` is in samples of a lane.

    Only what is shown of a window depends on the share.
    """

    seed: int
    batch_size: int
    samples: int
    count: int
    window: int
    share: slice

    def slots_per_stream(self) -> dict[int, int]:
        """Return the lanes that this rank has places of, in order, and how many places of a batch."""
        edges = [self._edge(lane) for lane in range(self.count + 1)]
        own = {
            lane: min(high, self.share.stop) - max(low, self.share.start)
            for lane, (low, high) in enumerate(pairwise(edges))
        }
        return {lane: places for lane, places in own.items() if places > 0}

    def windows(self, lane: int, images: range) -> Iterator[ShuffleWindow]:
        """Yield the windows of a lane that these images of the training are in, in order."""
        begin, end = self._of_lane(lane, images.start), self._of_lane(lane, images.stop)
        for epoch in count(images.start // self.samples):
            first, last = (self._of_lane(lane, number * self.samples) for number in (epoch, epoch + 1))
            skipped = max(begin - first, 0) // self.window * self.window
            for at in range(first + skipped, min(last, end), self.window):
                order = np.random.default_rng([self.seed, 5, lane, at]).permutation(min(self.window, last - at))
                place = at + np.arange(len(order))  # in the lane
                shown = order[(place >= begin) & (place < end) & self._own(lane, place)]
                yield ShuffleWindow(epoch, self._start(lane, epoch) + at - first, len(order), shown)
            if last >= end:
                return

    def _own(self, lane: int, place: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which places of a lane are this rank's: all, where no other one shares the lane."""
        low, high = self._edge(lane), self._edge(lane + 1)
        in_batch = low + place % (high - low)
        own: NDArray[np.bool_] = (in_batch >= self.share.start) & (in_batch < self.share.stop)
        return own

    def _edge(self, lane: int) -> int:
        """Return the place of a batch that a lane begins at."""
        return lane * self.batch_size // self.count

    def _start(self, lane: int, epoch: int) -> int:
        """Count the samples of an epoch that are of earlier lanes."""
        before, after = (self._below(self._edge(lane), number * self.samples) for number in (epoch, epoch + 1))
        return after - before

    def _of_lane(self, lane: int, images: int) -> int:
        """Count a lane's among the first images of the training."""
        return self._below(self._edge(lane + 1), images) - self._below(self._edge(lane), images)

    def _below(self, place: int, images: int) -> int:
        """Count those before this place of their batch among the first images of the training."""
        return images // self.batch_size * place + min(images % self.batch_size, place)


def num_streams(batch_size: int, shards: int) -> int:
    """Return the number of lanes: a power of two, as ranks often are, at most one for every shard or place."""
    return 1 << min(MAX_STREAMS, batch_size, shards).bit_length() - 1
