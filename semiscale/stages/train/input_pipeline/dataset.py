"""The batches of one rank of a training.

A set that fits in memory is read once and shuffled as a whole. A larger one is streamed. Each batch, its order and its
random crops are a function of the seed and the step.

For a GPU all this runs in a worker process (device_loader.py).
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semiscale.common.cpu import available_cpus
from semiscale.common.prefetch import prefetch
from semiscale.data.image_decoding import ImageArray
from semiscale.data.labeled import SHUFFLE_BUFFER_BYTES, LabeledShard
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import Batch
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.sample_source import (
    InMemorySource,
    SampleSource,
    StreamingSource,
    TrainSample,
)
from semiscale.stages.train.input_pipeline.train_transform import TrainTransform

# Importing it imports torchvision, which takes eight CPU-seconds. Only recipes with augmentation pay for it.
if TYPE_CHECKING:
    from semiscale.stages.train.input_pipeline.augmentation import Augment

# Batches that are ready, or being prepared, while the device works on another.
PREFETCH_BATCHES = 3
# Photographs that a thread gets at a time.
DECODE_CHUNK = 4


class TrainingBatch(NamedTuple):
    """One rank's part of a batch.

    Attributes:
        images_BHWC: Pixels, or clips_BTHWC of videos.
        labels_B: Numbers of the classes.
        keys: Keys of the samples.
    """

    images_BHWC: Batch
    labels_B: NDArray[np.int64]
    keys: list[str]


class TrainDataset:
    """The training set, as batches without end. An epoch may begin within a batch.

    It can be pickled before the first batch, for a worker process.

    Args:
        shards: Shards of the set.
        columns: Names of the columns or keys.
        preprocessing: Resolution, frames and kind of crop.
        seed: Seed of the training.
        ranks: This rank among all.
        augment: Changes of color and shape, if the recipe has them.

    Cost:
        A set of up to SHUFFLE_BUFFER_BYTES is held whole, on every rank. Of a larger set all ranks together hold twice
        SHUFFLE_BUFFER_BYTES. PREFETCH_BATCHES batches are held too, and the samples that are being decoded: one batch,
        and two chunks for every thread.
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
        self.samples = sum(shard.samples for shard in shards)
        self._seed, self._ranks = seed, ranks
        self._transform = TrainTransform(preprocessing, augment)
        self._chunk_size = 1 if preprocessing.frames else DECODE_CHUNK
        if self._transform.keeps_pixels:
            size_bytes = self.samples * self._transform.pixel_bytes
        else:
            size_bytes = sum(shard.shard.size_bytes for shard in shards)
        make_sample = self._transform.make_sample
        self._source: SampleSource
        if size_bytes <= SHUFFLE_BUFFER_BYTES:
            self._source = InMemorySource(shards, columns, seed, ranks, make_sample)
        else:
            shuffle_buffer = self.samples * SHUFFLE_BUFFER_BYTES // size_bytes
            self._source = StreamingSource(shards, columns, seed, ranks, make_sample, shuffle_buffer)

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of this rank's part of a batch, of images_BHWC or clips_BTHWC."""
        own_slice = self._ranks.batch_slice(batch_size)
        return (own_slice.stop - own_slice.start, *self._transform.sample_shape)

    def batches(self, batch_size: int, steps: int, after: int = 0) -> Generator[TrainingBatch]:
        """Yield this rank's part of each batch. A thread prepares the next ones meanwhile.

        Args:
            batch_size: Images of a batch, over all ranks.
            steps: Last step.
            after: Step after which the batches begin.

        Raises:
            SemiscaleError: A shard has changed since the plan, or a sample cannot be read.
        """
        return prefetch(self._prepare_batches(batch_size, steps, after), PREFETCH_BATCHES)

    def _prepare_batches(self, batch_size: int, steps: int, after: int) -> Generator[TrainingBatch]:
        """Yield this rank's part of each batch. While one is waited for, threads decode the next ones."""
        own_slice = self._ranks.batch_slice(batch_size)
        threads = max(available_cpus() // self._ranks.local_count, 1)
        decoding: deque[Callable[[], TrainingBatch]] = deque()
        with (
            ThreadPoolExecutor(threads) as pool,
            closing(self._source.batches(batch_size, steps, after)) as batches,
        ):
            for step, samples in enumerate(batches, after):
                randoms_BR = self._transform.draw_randoms(self._seed, step, batch_size)[own_slice]
                decoding.append(self._submit_batch(pool, samples, randoms_BR))
                if len(decoding) > 1 + 2 * self._chunk_size * threads // max(len(samples), 1):
                    yield decoding.popleft()()
            for wait_for_batch in decoding:
                yield wait_for_batch()

    def _submit_batch(
        self, pool: ThreadPoolExecutor, samples: list[TrainSample], randoms_BR: NDArray[np.float64]
    ) -> Callable[[], TrainingBatch]:
        """Submit the samples of a batch for decoding. The returned function waits for the batch.

        Tiny images are cropped by that function itself, because a crop takes less time than its submission.
        """
        chunks = [slice(start, start + self._chunk_size) for start in range(0, len(samples), self._chunk_size)]
        parts = [(samples[chunk], randoms_BR[chunk]) for chunk in chunks]
        futures = [] if self._transform.keeps_pixels else [pool.submit(self._transform_all, *part) for part in parts]

        def wait_for_batch() -> TrainingBatch:
            results = [future.result() for future in futures] or [self._transform_all(*part) for part in parts]
            images = [image for result in results for image in result]
            labels_B = np.array([sample.label for sample in samples], np.int64)
            return TrainingBatch(np.stack(images), labels_B, [sample.key for sample in samples])

        return wait_for_batch

    def _transform_all(self, samples: list[TrainSample], randoms_BR: NDArray[np.float64]) -> list[ImageArray]:
        return list(map(self._transform.apply, samples, randoms_BR))
