"""Build the view of a stored sample that a model is evaluated on.

The view is the centre of an image, or uniformly spaced clips of a video.
"""

from semiscale.data import video_decoding
from semiscale.data.image_decoding import decode_image
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch, center_crop


def eval_view(data: bytes, preprocessing: Preprocessing) -> Batch:
    """Return the view of one sample that a model is evaluated on.

    Args:
        data: The encoded image or video.
        preprocessing: The input of the model.

    Returns:
        image_HWC of an image, or clips_VTHWC of a video, uint8.

    Raises:
        DecodeError: The sample cannot be decoded.
    """
    if preprocessing.frames:
        return video_decoding.decode_eval_clips(data, preprocessing)
    return center_crop(decode_image(data), preprocessing)


def eval_view_shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the shape of a view."""
    image = (preprocessing.resolution, preprocessing.resolution, 3)
    return (video_decoding.EVAL_CLIPS, preprocessing.frames, *image) if preprocessing.frames else image


def eval_batch_size(images: int, preprocessing: Preprocessing) -> int:
    """Return how many samples are forwarded together.

    Args:
        images: The batch size for images.
        preprocessing: The input of the model. A sample of a video counts as all frames of its clips.

    Returns:
        The number of samples, at least 1. A video is never divided.
    """
    frames = video_decoding.EVAL_CLIPS * preprocessing.frames if preprocessing.frames else 1
    return max(images // frames, 1)
