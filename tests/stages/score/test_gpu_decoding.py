"""Test the decoder of the GPU on a CPU, where torchvision has the same calls.

No test of this module needs a GPU.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semiscale.common.errors import InvalidInputError
from semiscale.data import listing
from semiscale.data.image_decoding import ImageArray, decode_image
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import center_crop
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.gpu_decoding import GpuDecoder
from semiscale.stages.score.stage import score
from semiscale.stages.score.thread_shard_loader import ThreadShardLoader
from tests.support import sample_images

LARGE = Preprocessing(resolution=64, augmentation="crop-flip")
TINY = Preprocessing(resolution=16, augmentation="shift")
CPU = torch.device("cpu")


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Draw a smooth picture with an edge."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 // height, columns * 255 // width, np.where(columns > width / 3, 200, 30)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain_jpegs() -> list[bytes]:
    """Return JPEG files of many sizes, samplings and kinds that the device decodes."""
    sizes = [(500, 375), (375, 500), (64, 64), (73, 73), (20, 300), (9, 11)]
    files = [encode(scene(*size), quality=95, subsampling=number % 3) for number, size in enumerate(sizes)]
    return [*files, encode(scene(200, 150), progressive=True), encode(scene(200, 150, "L"))]


def damaged_after_its_header() -> bytes:
    """Return a progressive JPEG that no decoder finishes.

    A table after its first scan is damaged.
    """
    data = bytearray(encode(scene(200, 150), progressive=True))
    table = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def unsupported_files() -> dict[str, bytes]:
    """Return files that are left to the CPU, by kind."""
    rotation = Image.Exif()
    rotation[0x0112] = 6
    whole = plain_jpegs()[0]
    return {
        "turned": encode(scene(200, 150), exif=rotation),
        "CMYK": encode(scene(200, 150, "CMYK")),
        "RGB": encode(scene(200, 150), keep_rgb=True),
        "strip": encode(scene(4, 400)),
        "PNG": encode(scene(200, 150), "PNG"),
        "cut off": whole[: len(whole) // 2],
        "no image": b"text",
        "empty": b"",
        "damaged": damaged_after_its_header(),
    }


@pytest.mark.parametrize("preprocessing", [LARGE, TINY], ids=["large", "tiny"])
def test_device_crops_are_within_two_levels_of_cpu_crops(preprocessing: Preprocessing) -> None:
    images = plain_jpegs()
    for data, crop in zip(images, GpuDecoder(preprocessing, CPU).decode_and_crop(images), strict=True):
        expected = center_crop(decode_image(data), preprocessing)
        assert crop is not None
        assert crop.shape == expected.shape
        assert np.abs(crop.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", unsupported_files())
def test_unsupported_files_are_left_to_the_cpu_and_change_no_other_image(kind: str) -> None:
    decoder, images = GpuDecoder(LARGE, CPU), plain_jpegs()
    alone = [decoder.decode_and_crop([data])[0] for data in images]
    crops = decoder.decode_and_crop([images[0], unsupported_files()[kind], *images[1:]])
    assert crops.pop(1) is None
    assert all(is_same_image(crop, expected) for crop, expected in zip(crops, alone, strict=True))


def is_same_image(image: ImageArray | None, other: ImageArray | None) -> bool:
    """Check that two images were decoded and are equal."""
    return image is not None and other is not None and np.array_equal(image, other)


def test_both_decoders_fill_one_batch_in_order(tmp_path: Path) -> None:
    images = [image for pair in zip(plain_jpegs(), unsupported_files().values(), strict=False) for image in pair]
    sample_images.write_tar(tmp_path / "a.tar", {f"{number:03}.jpg": data for number, data in enumerate(images)})
    columns = SampleFields("image", "")
    slots = np.zeros((5, len(images), 64, 64, 3), np.uint8)
    loader = ThreadShardLoader(LARGE, columns, slots, 1, 2, GpuDecoder(LARGE, CPU))
    (batch,) = loader.batches(listing.list_shards([str(tmp_path / "a.tar")]))
    samples = batch.spans[0].samples
    assert [sample.problem for sample in samples[11::2]] == ["damaged image", "not an image", "empty file"]
    assert not any(sample.problem for sample in [*samples[:11], *samples[12::2]])
    assert all(sample.seconds > 0 for sample in samples[:11])
    for number, data in enumerate(images[:11]):
        difference = np.abs(batch.images_BHWC[number].astype(int) - center_crop(decode_image(data), LARGE)).max()
        assert difference <= (0 if number % 2 else 2), (
            "images that the CPU decodes have the same pixels as without a GPU"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_decoder_gpu_is_refused_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    config = ScoreConfig(
        workdir=str(tmp_path), plan="not read", teacher="not read", pod=0, images_per_class=1, decoder="gpu"
    )
    with pytest.raises(InvalidInputError, match="^decoder: .*SEMI-E271"):
        score(config)
