"""Normalize pixels to the input of a model.

Training, evaluation, scoring and exported files all compute `(pixels / 255 - mean) / std` in fp32 with this module. The
same pixels give the same bits on every path.
"""

import torch
from torch import Tensor, nn

from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch


class Normalize(nn.Module):
    """Convert decoded uint8 pixels to a model's fp32 input.

    The constants are buffers, so that they move to a device with the module and become part of an exported file.

    Args:
        preprocessing: Mean and standard deviation of the channels, and whether the samples are clips.
        device: Device of the constants.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        super().__init__()
        self._channel_axis = -4 if preprocessing.frames else -3
        # Shape of the constants behind the batch axes: C x H x W, or C x T x H x W for clips.
        shape = (3, 1, 1, 1) if preprocessing.frames else (3, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean, device=device).view(shape))
        self.register_buffer("std", torch.tensor(preprocessing.std, device=device).view(shape))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Return images_BCHW, or clips_BCTHW for clips_BTHWC.

        Other leading axes are kept.
        """
        pixels_BCHW = images_BHWC.movedim(-1, self._channel_axis).float()
        return (pixels_BCHW / 255 - self.mean) / self.std


def to_normalized_batch(images_BHWC: Batch, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Copy a batch to a device and normalize it there.

    The copied uint8 pixels are a quarter of the bytes of the normalized ones.

    Args:
        images_BHWC: uint8 images, or clips_BTHWC with any leading axes.
        preprocessing: Preprocessing that the model was trained with.
        device: Device of the model.

    Returns:
        fp32 images_BCHW, or clips_BCTHW, on the device.
    """
    pixels_BHWC = torch.from_numpy(images_BHWC).to(device, non_blocking=True)
    images_BCHW: Tensor = Normalize(preprocessing, device)(pixels_BHWC)
    return images_BCHW
