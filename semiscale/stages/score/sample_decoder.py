"""Decode the samples of a scan into the pixels that the teacher sees."""

import time

from semiscale.data import eval_transforms
from semiscale.data.image_decoding import describe_decode_error
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample
from semiscale.data.transforms import Batch
from semiscale.stages.score.gpu_decoding import GpuDecoder
from semiscale.stages.score.shard_loader import SampleInfo


class SampleDecoder:
    """Decodes samples. A sample that cannot be decoded is reported and does not raise an error.

    Args:
        preprocessing: Resolution and resizing.
        gpu_decoder: Decodes the images that it supports. The CPU decodes the rest.
    """

    def __init__(self, preprocessing: Preprocessing, gpu_decoder: GpuDecoder | None = None) -> None:
        self._preprocessing, self._gpu_decoder = preprocessing, gpu_decoder

    def decode_all(self, samples: list[Sample], images_BHWC: Batch) -> list[SampleInfo]:
        """Decode samples into the rows of a batch.

        Args:
            samples: Samples as they are stored.
            images_BHWC: Rows that the pixels are written to.

        Returns:
            A description of each sample.
        """
        if self._gpu_decoder is None:
            return list(map(self._decode, samples, images_BHWC))
        started = time.monotonic()
        crops = self._gpu_decoder.decode_and_crop([sample.image for sample in samples])
        seconds_each = (time.monotonic() - started) / max(sum(crop is not None for crop in crops), 1)
        infos = []
        for sample, image_HWC, crop in zip(samples, images_BHWC, crops, strict=True):
            if crop is None:
                infos.append(self._decode(sample, image_HWC))
            else:
                image_HWC[:] = crop
                infos.append(_sample_info(sample, "", seconds_each))
        return infos

    def _decode(self, sample: Sample, image_HWC: Batch) -> SampleInfo:
        if sample.problem:
            return _sample_info(sample, sample.problem, 0.0)
        started = time.monotonic()
        problem = ""
        try:
            image_HWC[:] = eval_transforms.eval_view(sample.image, self._preprocessing)
        # One image in a billion may raise an error that nobody expects. It must not end the scan.
        except Exception as error:  # noqa: BLE001
            problem = describe_decode_error(error, f"{sample.uri}: {sample.key}")
        return _sample_info(sample, problem, time.monotonic() - started)


def _sample_info(sample: Sample, problem: str, seconds: float) -> SampleInfo:
    size_bytes, has_data = len(sample.image), not sample.problem
    return SampleInfo(sample.index, sample.key, sample.uri, sample.offset, size_bytes, has_data, problem, seconds)
