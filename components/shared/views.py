"""What a model sees of a stored sample when it is measured: the centre of an image, or uniform clips of a video."""

from components.shared import clips
from components.shared.decode import decode
from components.shared.preprocess import Batch, fixed_cut
from components.shared.receipts import Preprocessing


def view(data: bytes, preprocessing: Preprocessing) -> Batch:
    """Return an image_HWC, or the clips_VTHWC of a video: uint8. Raises Undecodable."""
    if preprocessing.frames:
        return clips.fixed_clips(data, preprocessing)
    return fixed_cut(decode(data), preprocessing)


def shape(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the shape of a view."""
    image = (preprocessing.resolution, preprocessing.resolution, 3)
    return (clips.CLIPS, preprocessing.frames, *image) if preprocessing.frames else image


def batch(images: int, preprocessing: Preprocessing) -> int:
    """Return how many samples are forwarded together where it would be so many images: all clips of one at least."""
    frames = clips.CLIPS * preprocessing.frames if preprocessing.frames else 1
    return max(images // frames, 1)
