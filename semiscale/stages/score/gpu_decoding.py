"""Plain JPEGs decoded and cut on the GPU by nvJPEG, as the run asks for: `decoder: gpu`.

nvJPEG's pixels differ from libjpeg's, and so do those of the resizing, which is not rounded between its two directions
here: on an H100, of 100 photographs at 224, by two levels or less in 99% of the values and by 48 at most. So this is
never chosen by itself, and the scores say in their name how they were decoded. It decodes some files that are cut off
before their end and mended there, which libjpeg refuses.
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

_END = b"\xff\xd9"
_COLOURS = ("YCbCr", "Gray")  # a JPEG that holds RGB says so in a marker of Adobe's
# Of what torchvision says where an image is not decoded, what is not the image's fault; 5: nvJPEG found no memory.
_OF_THE_DEVICE = re.compile(r"out of memory|CUDA error|: 5\b")


def require_gpu() -> None:
    """Raise InvalidInputError where there is no GPU to decode on."""
    if not torch.cuda.is_available():
        raise InvalidInputError(
            "SEMI-E271", "decoder: The value gpu needs a CUDA device, and this machine has none. Set decoder to cpu."
        )


class GpuDecoder:
    """Decodes and cuts a few images at a time, for any number of threads; on a CPU, for tests, by the same calls.

    An image's pixels do not depend on those beside it. Threads take turns, as they do within torchvision, so that the
    device holds the pixels of one call: at most eight images of decode.MAX_PIXELS, 270 MB each, and one as floats.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing, self._device, self._turn = preprocessing, device, Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def decode_and_crop(self, images: Sequence[bytes]) -> list[ImageArray | None]:
        """Return what the model sees of each image, as preprocess.fixed_cut does within two levels; None where the CPU
        has to decode it: what is odd, in its header or to nvJPEG.
        """
        places = [place for place, data in enumerate(images) if _for_the_device(data)]
        cuts: list[ImageArray | None] = [None] * len(images)
        with self._turn, torch.inference_mode(), self._on_stream():
            decoded = self._decoded([images[place] for place in places])
            there = {place: self._cut(image) for place, image in zip(places, decoded, strict=True) if image is not None}
            if there:
                for place, pixels in zip(there, torch.stack(list(there.values())).cpu().numpy(), strict=True):
                    cuts[place] = pixels
        return cuts

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _decoded(self, images: list[bytes]) -> list[Tensor | None]:
        """Decode on the device, one by one where that fails for all: torchvision gives all images or none."""
        if not images:
            return []
        try:
            return list(self._decode(images))
        except RuntimeError as error:
            if _OF_THE_DEVICE.search(str(error)):
                raise SemiscaleError(
                    "SEMI-E274",
                    f"decoder: The GPU cannot decode images: {error}. Set decoder to cpu, or use another GPU.",
                ) from None
        return [None] if len(images) == 1 else [self._decoded([image])[0] for image in images]

    def _decode(self, images: list[bytes]) -> list[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg  # takes seconds to import

        # torchvision decodes on a stream of its own that does not wait for this one, into memory that this one may
        # still be reading (pytorch/vision#9606): it has to be idle.
        if self._stream:
            self._stream.synchronize()
        encoded = [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in images]
        decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return decoded

    def _cut(self, image_CHW: Tensor) -> Tensor:
        """Resize and cut the centre: a triangle filter as wide as the reduction, in floats, rounded once."""
        size = self._preprocessing.resolution
        height, width = resize_shape(image_CHW.shape[1], image_CHW.shape[2], self._preprocessing)
        resized_BCHW = F.interpolate(image_CHW[None].float(), (height, width), mode="bilinear", antialias=True)
        top, left = (height - size) // 2, (width - size) // 2
        cut_CHW = resized_BCHW[0, :, top : top + size, left : left + size]
        return cut_CHW.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def _for_the_device(data: bytes) -> bool:
    """Say whether an image is whole, has nothing odd about it, and is no strip, whose ends fixed_cut leaves out."""
    header = baseline_jpeg_header(data) if data.endswith(_END) else None
    return header is not None and header[2] in _COLOURS and max(header[:2]) <= MAX_ASPECT_RATIO * min(header[:2])
