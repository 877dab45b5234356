"""Decode and crop plain JPEGs on the GPU by nvJPEG, for `decoder: gpu`.

The pixels of nvJPEG differ from those of libjpeg. The resized pixels differ too, because they are not rounded between
the two directions. Measured on an H100 with 100 photographs at 224 pixels, 99% of the values differ by at most two
levels, and the largest difference is 48. This decoder is therefore never chosen automatically, and the name of the
score folder contains it.

nvJPEG also completes some truncated files that libjpeg refuses.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data.image_decoding import ImageArray, baseline_jpeg_header
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import MAX_ASPECT_RATIO, resize_shape

_END_OF_IMAGE = b"\xff\xd9"
# RGB is missing. A JPEG that stores RGB is marked by an Adobe segment.
_COLOR_SPACES = ("YCbCr", "Gray")
# Errors of torchvision that the image did not cause. Status 5 of nvJPEG is a failed allocation.
_DEVICE_ERROR = re.compile(r"out of memory|CUDA error|: 5\b")


def require_gpu() -> None:
    """Check that this machine can decode on a GPU.

    Raises:
        InvalidInputError: No CUDA device is available.
    """
    if not torch.cuda.is_available():
        raise InvalidInputError(
            "SEMI-E271", "decoder: The value gpu needs a CUDA device, and this machine has none. Set decoder to cpu."
        )


class GpuDecoder:
    """Decodes and crops a few images at a time. Any thread may call it.

    The pixels of an image do not depend on the other images of a call. Tests run the same calls on a CPU.

    Args:
        preprocessing: Resolution and resizing.
        device: Device that decodes.

    Cost:
        Device memory of one call, because calls take turns, as they do within torchvision. That is at most eight images
        of `MAX_PIXELS`, 270 MB each, and one of them in floats.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing, self._device, self._lock = preprocessing, device, Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def decode_and_crop(self, images: Sequence[bytes]) -> list[ImageArray | None]:
        """Return the centre crop of each image.

        Args:
            images: Encoded images.

        Returns:
            Pixels within two levels of `center_crop`. None for an image that the CPU has to decode, because its header
            is unusual or nvJPEG refuses it.

        Raises:
            SemiscaleError: The device cannot decode, for example because it has no memory left.
        """
        supported = [index for index, data in enumerate(images) if _is_supported(data)]
        crops: list[ImageArray | None] = [None] * len(images)
        with self._lock, torch.inference_mode(), self._use_stream():
            decoded = self._decode_or_none([images[index] for index in supported])
            cropped = {
                index: self._crop(image) for index, image in zip(supported, decoded, strict=True) if image is not None
            }
            if cropped:
                # One copy for all images. It also waits for the stream.
                for index, pixels in zip(cropped, torch.stack(list(cropped.values())).cpu().numpy(), strict=True):
                    crops[index] = pixels
        return crops

    def _use_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _decode_or_none(self, images: list[bytes]) -> list[Tensor | None]:
        """Decode images, with None for an image that nvJPEG refuses."""
        if not images:
            return []
        try:
            return list(self._decode(images))
        except RuntimeError as error:
            if _DEVICE_ERROR.search(str(error)):
                raise SemiscaleError(
                    "SEMI-E274",
                    f"decoder: The GPU cannot decode images: {error}. Set decoder to cpu, or use another GPU.",
                ) from None
        # torchvision returns all images or none, so they are decoded one by one to find the refused ones.
        return [None] if len(images) == 1 else [self._decode_or_none([image])[0] for image in images]

    def _decode(self, images: list[bytes]) -> list[Tensor]:
        # The import takes seconds.
        from torchvision.io import ImageReadMode, decode_jpeg

        # torchvision decodes on a stream of its own and does not wait for this one. It may write into memory that this
        # stream still reads (pytorch/vision#9606), so this stream has to be idle.
        if self._stream:
            self._stream.synchronize()
        encoded = [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in images]
        decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return decoded

    def _crop(self, image_CHW: Tensor) -> Tensor:
        """Resize an image and crop its centre.

        The filter is a triangle as wide as the reduction. It computes in floats, and the result is rounded once.
        """
        size = self._preprocessing.resolution
        height, width = resize_shape(image_CHW.shape[1], image_CHW.shape[2], self._preprocessing)
        resized_BCHW = F.interpolate(image_CHW[None].float(), (height, width), mode="bilinear", antialias=True)
        top, left = (height - size) // 2, (width - size) // 2
        crop_CHW = resized_BCHW[0, :, top : top + size, left : left + size]
        return crop_CHW.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def _is_supported(data: bytes) -> bool:
    """Check that an image is a whole JPEG with a usual header.

    Narrow strips are left to the CPU, because `center_crop` leaves out their ends.
    """
    header = baseline_jpeg_header(data) if data.endswith(_END_OF_IMAGE) else None
    return header is not None and header[2] in _COLOR_SPACES and max(header[:2]) <= MAX_ASPECT_RATIO * min(header[:2])
