"""Decoding on the device: torchvision's calls on a CPU, which has them too; nothing here has seen a GPU."""

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
from semiscale.stages.score.shard_loader import ShardLoader
from semiscale.stages.score.stage import score
from tests.support import pictures

LARGE = Preprocessing(resolution=64, augmentation="crop-flip")
TINY = Preprocessing(resolution=16, augmentation="shift")
CPU = torch.device("cpu")


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture with an edge."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 // height, columns * 255 // width, np.where(columns > width / 3, 200, 30)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8)).convert(mode)


def stored(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain() -> list[bytes]:
    """JPEG files of many sizes, samplings and kinds that the device decodes."""
    sizes = [(500, 375), (375, 500), (64, 64), (73, 73), (20, 300), (9, 11)]
    files = [stored(scene(*size), quality=95, subsampling=number % 3) for number, size in enumerate(sizes)]
    return [*files, stored(scene(200, 150), progressive=True), stored(scene(200, 150, "L"))]


def beyond_its_header() -> bytes:
    """A progressive JPEG that is damaged behind its first scan, in a table, so that no decoder gets further."""
    data = bytearray(stored(scene(200, 150), progressive=True))
    table = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def odd() -> dict[str, bytes]:
    """Files that are left to the CPU."""
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = plain()[0]
    return {
        "turned": stored(scene(200, 150), exif=turned),
        "CMYK": stored(scene(200, 150, "CMYK")),
        "RGB": stored(scene(200, 150), keep_rgb=True),
        "strip": stored(scene(4, 400)),
        "PNG": stored(scene(200, 150), "PNG"),
        "cut off": whole[: len(whole) // 2],
        "no image": b"text",
        "empty": b"",
        "damaged": beyond_its_header(),
    }


@pytest.mark.parametrize("preprocessing", [LARGE, TINY], ids=["large", "tiny"])
def test_the_devices_cut_is_the_cpus_within_two_levels(preprocessing: Preprocessing) -> None:
    images = plain()
    for data, found in zip(images, GpuDecoder(preprocessing, CPU).decode_and_crop(images), strict=True):
        expected = center_crop(decode_image(data), preprocessing)
        assert found is not None
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", odd())
def test_what_is_odd_is_left_to_the_cpu_and_changes_no_neighbour(kind: str) -> None:
    decoder, images = GpuDecoder(LARGE, CPU), plain()
    alone = [decoder.decode_and_crop([data])[0] for data in images]
    found = decoder.decode_and_crop([images[0], odd()[kind], *images[1:]])
    assert found.pop(1) is None
    assert all(same(one, other) for one, other in zip(found, alone, strict=True))


def same(one: ImageArray | None, other: ImageArray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def test_images_of_both_decoders_come_in_one_batch_each_in_its_place(tmp_path: Path) -> None:
    images = [image for pair in zip(plain(), odd().values(), strict=False) for image in pair]
    pictures.write_tar(tmp_path / "a.tar", {f"{number:03}.jpg": data for number, data in enumerate(images)})
    columns = SampleFields("image", "")
    room = np.zeros((5, len(images), 64, 64, 3), np.uint8)
    feed = ShardLoader(LARGE, columns, room, 1, 2, GpuDecoder(LARGE, CPU))
    (batch,) = feed.batches(listing.list_shards([str(tmp_path / "a.tar")]))
    decoded = batch.spans[0].seen
    assert [one.problem for one in decoded[11::2]] == ["damaged image", "not an image", "empty file"]
    assert not any(one.problem for one in [*decoded[:11], *decoded[12::2]])
    assert all(one.seconds > 0 for one in decoded[:11])
    for number, data in enumerate(images[:11]):
        difference = np.abs(batch.images_BHWC[number].astype(int) - center_crop(decode_image(data), LARGE)).max()
        assert difference <= (0 if number % 2 else 2), "what the CPU decodes has the CPU's pixels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    config = ScoreConfig(
        workdir=str(tmp_path), plan="not read", teacher="not read", pod=0, images_per_class=1, decoder="gpu"
    )
    with pytest.raises(InvalidInputError, match="^decoder: .*SEMI-E271"):
        score(config)
