"""Turn a training sample into the pixels that the network sees.

The result is a function of the sample and of some uniform random numbers. It does not depend on the thread or the rank
that computes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semiscale.common.errors import SemiscaleError
from semiscale.data.image_decoding import ImageArray, decode_image, describe_decode_error
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample
from semiscale.data.transforms import (
    CROP_RANDOM_COUNT,
    jpeg_scale_denominator,
    pad_for_shift,
    random_resized_crop,
    random_shift,
    shift_padding,
)
from semiscale.data.video_decoding import decode_train_clip
from semiscale.stages.train.input_pipeline.sample_source import TrainSample

# Importing it imports torchvision, which takes eight CPU-seconds. Only recipes with augmentation pay for it.
if TYPE_CHECKING:
    from semiscale.stages.train.input_pipeline.augmentation import Augment


class TrainTransform:
    """Decodes, crops and augments training samples.

    Args:
        preprocessing: Resolution, frames and kind of crop.
        augment: Changes of color and shape after the crop, if the recipe has them.
    """

    def __init__(self, preprocessing: Preprocessing, augment: "Augment | None" = None) -> None:
        self._preprocessing, self._augment = preprocessing, augment

    @property
    def keeps_pixels(self) -> bool:
        """Whether samples are kept in memory as pixels.

        Tiny images are. Their crop takes a microsecond, while decoding a photograph takes milliseconds.
        """
        return not self._preprocessing.frames and self._preprocessing.augmentation != "crop-flip"

    @property
    def pixel_bytes(self) -> int:
        """Memory of a sample that is kept as pixels, in bytes."""
        side = self._preprocessing.resolution + 2 * shift_padding(self._preprocessing)
        return 3 * side**2

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a result: HWC of an image, THWC of a clip."""
        size = self._preprocessing.resolution
        return (self._preprocessing.frames, size, size, 3) if self._preprocessing.frames else (size, size, 3)

    def make_sample(self, sample: Sample, label: int) -> TrainSample:
        """Return a sample in the form in which it is kept in memory.

        Args:
            sample: Sample as it is stored.
            label: Number of its class.

        Raises:
            SemiscaleError: A tiny image cannot be decoded.
        """
        if not self.keeps_pixels:
            return TrainSample(sample.key, sample.image, label)
        with _reraise_unreadable(sample.key):
            image = decode_image(sample.image)
        return TrainSample(sample.key, pad_for_shift(image, self._preprocessing), label)

    def draw_randoms(self, seed: int, step: int, batch_size: int) -> NDArray[np.float64]:
        """Draw the random numbers of a batch.

        Args:
            seed: Seed of the training.
            step: Step of the batch.
            batch_size: Images of the batch, over all ranks.

        Returns:
            randoms_BR: Uniform numbers in [0, 1). The first CROP_RANDOM_COUNT columns are for the crop, the others for
                the augmentation.
        """
        crop_BR = np.random.default_rng([seed, 1, step]).random((batch_size, CROP_RANDOM_COUNT))
        count = self._augment.randoms if self._augment else 0
        return np.concatenate([crop_BR, np.random.default_rng([seed, 4, step]).random((batch_size, count))], axis=1)

    def apply(self, sample: TrainSample, randoms_R: NDArray[np.float64]) -> ImageArray:
        """Return the pixels of a sample: image_HWC, or clip_THWC.

        Args:
            sample: The sample.
            randoms_R: Its row of the random numbers of the batch.

        Raises:
            SemiscaleError: The sample cannot be decoded.
        """
        image = self._crop(sample, randoms_R[:CROP_RANDOM_COUNT])
        return self._augment(image, randoms_R[CROP_RANDOM_COUNT:]) if self._augment else image

    def _crop(self, sample: TrainSample, randoms_R: NDArray[np.float64]) -> ImageArray:
        if not isinstance(sample.image, bytes):
            return random_shift(sample.image, self._preprocessing, randoms_R)
        with _reraise_unreadable(sample.key):
            if self._preprocessing.frames:
                return decode_train_clip(sample.image, self._preprocessing, randoms_R)
            full_size: tuple[int, int] | None = None

            def choose_scale_denominator(height: int, width: int) -> int:
                nonlocal full_size
                full_size = (height, width)
                return jpeg_scale_denominator(height, width, self._preprocessing, randoms_R)

            image = decode_image(sample.image, choose_scale_denominator)
        return random_resized_crop(image, self._preprocessing, randoms_R, full_size)


@contextmanager
def _reraise_unreadable(key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SemiscaleError(
            "SEMI-E243",
            f"{key}: {describe_decode_error(error, key)}. The plan could read it. Restore it, or run the plan again.",
        ) from error
