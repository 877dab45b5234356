"""What a model sees of a stored sample when it is measured: the centre of an image, or uniform clips of a video."""

from semiscale.data import video_decoding
from semiscale.data.image_decoding import decode_image
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch, center_crop


def eval_view(data: bytes, preprocessing: Preprocessing) -> Batch:
    """Return an image_HWC, or the clips_VTHWC of a video: uint8. Raises Undecodable."""
    if preprocessing.frames:
        return video_decoding.decode_eval_clips(data, preprocessing)
    return center_crop(decode_image(data), preprocessing)


def eval_view_shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the shape of a view."""
    image = (preprocessing.resolution, preprocessing.resolution, 3)
    return (video_decoding.EVAL_CLIPS, preprocessing.frames, *image) if preprocessing.frames else image


def eval_batch_size(images: int, preprocessing: Preprocessing) -> int:
    """Return how many samples are forwarded together where it would be so many images: all clips of one at least."""
    frames = video_decoding.EVAL_CLIPS * preprocessing.frames if preprocessing.frames else 1
    return max(images // frames, 1)
