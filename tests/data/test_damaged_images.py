"""Test that damaged and hostile images are refused with a reason."""

import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semiscale.data.image_decoding import MAX_PIXELS, DecodeError, decode_image
from tests.support.encoded_images import assert_close, encode, make_gradients, make_noise, make_png, png_chunk

# The module silences Pillow for the whole process, but pytest adds its own filters in front.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"plain text\n" * 100, b"<html></html>", b"\xff\xd8", b"RIFF\0\0\0\0WEBP"]
)
def test_data_that_are_not_an_image_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^(not an|damaged) image$"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"", b"plain text\n" * 100, b"<html></html>", b"RIFF\0\0\0\0WAVE"])
def test_the_reason_for_other_data_is_that_they_are_not_an_image(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^not an image$"):
        decode_image(data)


@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"quality": 20}])
def test_a_jpeg_truncated_anywhere_is_damaged(options: dict[str, Any]) -> None:
    # A viewer would show the missing part in gray. The model would score the gray as if it were part of the image.
    data = encode(Image.fromarray(make_noise()), "JPEG", **options)
    for length in range(4, len(data)):
        with pytest.raises(DecodeError, match=r"^damaged image$"):
            decode_image(data[:length])


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})])
def test_truncated_images_of_other_formats_are_damaged(format: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(make_noise()), format, **options)
    for share in (0.05, 0.1, 0.3, 0.5, 0.9):
        with pytest.raises(DecodeError, match=r"^damaged image$"):
            decode_image(data[: int(len(data) * share)])


def test_a_png_without_its_last_bytes_is_whole() -> None:
    # All pixels are there. Only the checksum of the end marker is missing.
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(make_noise()), "PNG")[:-4]), make_noise())


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1), (1, 2 * MAX_PIXELS)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(DecodeError, match=f"^more than {MAX_PIXELS} pixels$"):
        decode_image(make_png(*size))


def test_a_jpeg_of_too_many_scans_is_refused_by_its_headers() -> None:
    image = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    bomb = image[:-2] + image[image.rindex(b"\xff\xda") : -2] * 1000 + image[-2:]
    assert (decode_image(image) == 0).all()
    with pytest.raises(DecodeError, match=r"^a JPEG of too many scans$"):
        decode_image(bomb)


def test_scan_markers_after_the_end_of_a_jpeg_are_ignored() -> None:
    # Phones append videos to photographs.
    image = encode(Image.fromarray(make_gradients()), "JPEG", quality=95) + b"\xff\xda" * 2_000_000
    assert_close(decode_image(image), make_gradients())


def test_a_decompression_bomb_in_the_metadata_is_damaged() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(50 << 20), 1)
    with pytest.raises(DecodeError, match=r"^damaged image$"):
        decode_image(make_png(1, 1, b"\0\1\2\3", png_chunk(b"zTXt", text)))


@pytest.mark.parametrize("kind", ["EXIF of a JPEG", "fill of a JPEG", "texts of a PNG", "comments of a GIF"])
def test_too_many_pieces_of_metadata_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A megabyte of metadata is tested against a limit that is lower in proportion. EXIF pieces take five megabytes and
    # the real limit. Pillow joined them in half a minute, because its time grew with the square of their number.
    if kind != "EXIF of a JPEG":
        monkeypatch.setattr("semiscale.data.image_decoding.MAX_READS", 1 << 16)
    format, before, piece = {
        "EXIF of a JPEG": ("JPEG", 2, b"\xff\xe1" + struct.pack(">H", 58) + b"Exif\0\0" + bytes(50)),
        "fill of a JPEG": ("JPEG", 2, b"\xff"),
        "texts of a PNG": ("PNG", 33, b"\0\0\0\2tEXta\0" + struct.pack(">I", zlib.crc32(b"tEXta\0"))),
        "comments of a GIF": ("GIF", 13 + 6, b"!\xfe\1x\0"),
    }[kind]
    whole = encode(Image.new("1", (2, 2)), format)
    few, many = (
        whole[:before] + piece * count + whole[before:]
        for count in (9, (5 << 20 if "EXIF" in kind else 1 << 20) // len(piece))
    )
    assert decode_image(few).shape == (2, 2, 3)
    with pytest.raises(DecodeError, match=r"^too many pieces of metadata$"):
        decode_image(many)


def test_an_image_without_pixels_is_refused() -> None:
    for size in ((0, 0), (0, 9), (9, 0)):
        with pytest.raises(DecodeError):
            decode_image(make_png(*size))


def test_random_damage_has_a_documented_reason() -> None:
    # Pillow does not document its errors for damaged images. A minute of this test raised no other error either.
    rng = random.Random(0)
    image = Image.fromarray(make_noise())
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encode(image, format, exif=exif) for format in ("JPEG", "PNG", "WEBP")] + [encode(image, "GIF")]
    reasons = set()
    for _ in range(2000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode_image(bytes(data)).shape[2] == 3
        except DecodeError as reason:
            reasons.add(str(reason))
    assert reasons <= {"not an image", "damaged image", f"more than {MAX_PIXELS} pixels"}
