"""The interface of the loaders that read and decode shards before the model needs them.

ThreadShardLoader works in threads of this process. ProcessShardLoader runs one of them in each of several worker
processes, for a GPU.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from semiscale.data.shard import Shard
from semiscale.data.transforms import Batch

# When a scan stops, a read in progress is waited for so long.
SHUTDOWN_TIMEOUT_S = 5.0


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


class ShardLoader(Protocol):
    """Loads shards as batches of decoded samples."""

    def batches(self, shards: Iterable[Shard]) -> Generator[DecodedBatch]:
        """Yield decoded batches.

        The spans of a shard arrive in order, and the last one is marked. Batches of different shards may interleave.

        Args:
            shards: Shards to load. They are iterated over in a thread.

        Yields:
            Batches. The consumer has to release the slot of each one.

        Raises:
            SemiscaleError: A shard disappeared, or a worker process ended. Other errors of iterating or reading are
                raised too, after the batches before them.
        """

    def release(self, slot: int) -> None:
        """Free the slot of a batch for the next one."""
