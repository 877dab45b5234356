"""Test image decoding: formats, bit depths, transparency, rotation and frames."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, ImageSequence

from semiscale.data.image_decoding import DecodeError, decode_image
from tests.support.encoded_images import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    Array,
    assert_close,
    encode,
    make_gradients,
    make_noise,
    make_png,
    make_quadrants,
    png_chunk,
)

# The module silences Pillow for the whole process, but pytest adds its own filters in front. A test below checks the
# silence in a process without pytest.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def make_16_bit_png(channels: int, pixels: list[list[int]], transparent: list[int]) -> bytes:
    """Return a PNG of one row with 16 bits per channel and a transparent colour."""
    bits_and_color_type = (16, 0 if channels == 1 else 2)
    return make_keyed_png(len(pixels), bits_and_color_type, np.array(pixels, ">u2").tobytes(), transparent)


def make_keyed_png(width: int, bits_and_color_type: tuple[int, int], row: bytes, transparent: list[int]) -> bytes:
    """Return a PNG of one row, in which a colour is transparent.

    Args:
        width: The number of pixels.
        bits_and_color_type: The bits per channel, and the colour type of the header.
        row: The bytes of the pixels.
        transparent: The transparent colour, a value for each channel.
    """
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, *bits_and_color_type, 0, 0, 0))
    transparency = png_chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + transparency + pixels + png_chunk(b"IEND", b"")


def test_a_transparent_colour_of_16_bits_is_white() -> None:
    assert decode_image(make_16_bit_png(1, [[0], [40000]], [40000])).tolist() == [[[0] * 3, [255] * 3]]
    assert decode_image(make_16_bit_png(3, [[256, 512, 768], [40000, 0, 0]], [40000, 0, 0])).tolist() == [
        [[1, 2, 3], [255] * 3]
    ]


@pytest.mark.parametrize(("bits", "row", "shown"), [(2, 0b00_01_10_11, [0, 255, 170]), (4, 0x01, [0, 255])])
def test_a_transparent_gray_of_2_or_4_bits_is_white(bits: int, row: int, shown: list[int]) -> None:
    pixels = decode_image(make_keyed_png(len(shown), (bits, 0), bytes([row]), [1]))
    assert pixels[0, :, 0].tolist() == shown


class TestFormats:
    @pytest.mark.parametrize("format", ["JPEG", "WEBP"])
    def test_lossy_formats_are_decoded_closely(self, format: str) -> None:
        assert_close(decode_image(encode(Image.fromarray(make_gradients()), format, quality=95)), make_gradients())

    @pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
    def test_lossless_formats_are_decoded_exactly(self, format: str, options: dict[str, Any]) -> None:
        pixels = decode_image(encode(Image.fromarray(make_noise()), format, **options))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, make_noise())

    def test_a_progressive_jpeg_is_decoded(self) -> None:
        assert_close(
            decode_image(encode(Image.fromarray(make_gradients()), "JPEG", quality=95, progressive=True)),
            make_gradients(),
        )

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_gray_images_get_three_equal_channels(self, format: str) -> None:
        gray = Image.fromarray(make_gradients()).convert("L")
        pixels = decode_image(encode(gray, format))
        assert_close(pixels, np.asarray(gray.convert("RGB")))
        assert (pixels[..., 0] == pixels[..., 1]).all()

    def test_a_cmyk_jpeg_is_converted_to_rgb(self) -> None:
        # ImageNet of 2012 has 22 of them.
        assert_close(
            decode_image(encode(Image.fromarray(make_gradients()).convert("CMYK"), "JPEG", quality=95)),
            make_gradients(),
            25,
        )

    def test_images_of_1_bit_are_decoded(self) -> None:
        pixels = decode_image(encode(Image.fromarray(make_noise()).convert("1"), "PNG"))
        assert set(np.unique(pixels)) == {0, 255}

    def test_a_palette_is_applied(self) -> None:
        np.testing.assert_array_equal(decode_image(encode(make_quadrants("P"), "PNG")), np.asarray(make_quadrants()))

    def test_an_image_of_a_single_pixel_is_decoded(self) -> None:
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
            assert decode_image(encode(Image.new("RGB", (1, 1), WHITE), format)).tolist() == [[[255, 255, 255]]]

    @pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "EPS", "PDF"])
    def test_other_formats_are_refused(self, format: str) -> None:
        with pytest.raises(DecodeError, match=r"^not an image$"):
            decode_image(encode(Image.fromarray(make_noise()), format))


class TestSixteenBits:
    def test_gray_is_the_high_byte(self) -> None:
        values = np.random.default_rng(1).integers(0, 65536, (24, 32)).astype(np.uint16)
        pixels = decode_image(encode(Image.fromarray(values), "PNG"))
        np.testing.assert_array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))

    def test_colour_is_the_high_byte(self) -> None:
        values = np.random.default_rng(1).integers(0, 65536, (4, 5, 3)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        data = bytearray(make_png(5, 4, rows))
        # Byte 24 of the header states the bits per channel. The checksum of the header follows at byte 29.
        data[24] = 16
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        np.testing.assert_array_equal(decode_image(bytes(data)), (values >> 8).astype(np.uint8))


class TestTransparency:
    def test_transparent_pixels_are_blended_with_white(self) -> None:
        image = Image.new("RGBA", (3, 1))
        image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 255, 51)])
        for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True, "exact": True}):
            assert decode_image(encode(image, **options)).tolist() == [[list(RED), list(WHITE), [204, 204, 255]]]

    def test_gray_with_alpha_is_blended(self) -> None:
        image = Image.new("LA", (2, 1))
        image.putdata([(0, 255), (0, 0)])
        assert decode_image(encode(image, "PNG")).tolist() == [[list(BLACK), list(WHITE)]]

    def test_a_palette_with_alpha_is_blended(self) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        alphas = bytes([255, 0, 51])
        assert decode_image(encode(image, "PNG", transparency=alphas)).tolist() == [
            [list(RED), list(WHITE), [204, 204, 255]]
        ]

    @pytest.mark.parametrize("format", ["PNG", "GIF"])
    def test_a_transparent_colour_of_a_palette_is_white(self, format: str) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *GREEN])
        image.putdata([0, 1])
        assert decode_image(encode(image, format, transparency=1)).tolist() == [[list(RED), list(WHITE)]]

    def test_a_transparent_colour_of_8_bits_is_white(self) -> None:
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), BLUE)
        assert decode_image(encode(image, "PNG", transparency=BLUE)).tolist() == [[list(RED), list(WHITE)]]
        gray = Image.new("L", (2, 1), 0)
        gray.putpixel((1, 0), 9)
        assert decode_image(encode(gray, "PNG", transparency=9)).tolist() == [[list(BLACK), list(WHITE)]]


class TestExif:
    # Each row has a value of the tag Orientation (EXIF 2.32, section 4.6.4). The two sides say at which side of the
    # displayed image the first stored row and the first stored column appear.
    DISPLAYED_SIDES = (
        (1, "top", "left"),
        (2, "top", "right"),
        (3, "bottom", "right"),
        (4, "bottom", "left"),
        (5, "left", "top"),
        (6, "right", "top"),
        (7, "right", "bottom"),
        (8, "left", "bottom"),
    )

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize(("orientation", "first_row", "first_column"), DISPLAYED_SIDES)
    def test_the_rotation_is_applied(self, format: str, orientation: int, first_row: str, first_column: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = decode_image(
            encode(make_quadrants(), format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
        )
        assert pixels.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
        # The red quadrant is stored at the first row and first column. The green one is next to it in the first row.
        assert_close(_corner_pixel(pixels, {first_row, first_column}), np.array(RED), 40)
        assert_close(_corner_pixel(pixels, {first_row, _OPPOSITE[first_column]}), np.array(GREEN), 40)
        assert_close(_corner_pixel(pixels, {_OPPOSITE[first_row], first_column}), np.array(BLUE), 40)

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_a_jpeg_with_exif_has_pillows_pixels_and_is_reduced_after_rotation(
        self, orientation: int, mode: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(make_gradients()[:41, :63]).convert(mode), "JPEG", exif=exif, quality=90)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode_image(data), np.asarray(shown.convert("RGB")))
        sizes: list[tuple[int, int]] = []

        def reduce_by_two(height: int, width: int) -> int:
            sizes.append((height, width))
            return 2

        reduced = decode_image(data, reduce_by_two)
        assert sizes == [(shown.height, shown.width)]
        assert reduced.shape == (-(-shown.height // 2), -(-shown.width // 2), 3)
        assert_close(reduced, np.asarray(shown.convert("RGB").reduce(2)), 8)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_unknown_orientation_is_ignored(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(
            decode_image(encode(make_quadrants(), "PNG", exif=exif)), np.asarray(make_quadrants())
        )

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" * 9]
    )
    def test_damaged_metadata_are_ignored(self, exif: bytes) -> None:
        assert_close(
            decode_image(encode(Image.fromarray(make_gradients()), "JPEG", exif=exif, quality=95)), make_gradients()
        )

    def test_the_rotation_can_be_in_the_second_piece_of_the_exif(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        pieces = [b"Exif\0\0" + part for part in (exif.tobytes()[6:12], exif.tobytes()[12:])]
        segments = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(piece)) + piece for piece in pieces)
        image = encode(make_quadrants(), "JPEG")
        assert decode_image(image[:2] + segments + image[2:]).shape == (64, 32, 3)


_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def _corner_pixel(pixels: Array, sides: set[str]) -> Array:
    """Return a pixel well inside the corner between two sides."""
    height, width = pixels.shape[:2]
    pixel: Array = pixels[6 if "top" in sides else height - 7, 6 if "left" in sides else width - 7]
    return pixel


class TestFrames:
    @pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {})])
    def test_the_first_frame_is_decoded(self, format: str, options: dict[str, Any]) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
        assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
        assert np.unique(decode_image(data).reshape(-1, 3), axis=0).tolist() == [list(RED)]

    def test_the_first_animated_frame_precedes_the_default_image(self) -> None:
        # An animated PNG may have a still image for viewers that cannot animate.
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
        assert np.unique(decode_image(data).reshape(-1, 3), axis=0).tolist() == [list(GREEN)]
        still = data[: data.index(b"fcTL") - 4] + data[data.index(b"IEND") - 4 :]
        assert np.unique(decode_image(still).reshape(-1, 3), axis=0).tolist() == [list(RED)]

    def test_the_canvas_around_the_first_frame_of_a_gif_is_white(self) -> None:
        data = bytearray(encode(Image.new("P", (2, 1), 0), "GIF"))
        frame = data.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 2, 1))
        # The header states a canvas of 4 x 2 pixels. The frame begins at column 1.
        data[6:10] = struct.pack("<HH", 4, 2)
        data[frame + 1 : frame + 3] = struct.pack("<H", 1)
        assert decode_image(bytes(data))[..., 0].tolist() == [[255, 0, 0, 255], [255] * 4]

    def test_a_stereo_jpeg_shows_its_first_image(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (WHITE, BLACK)]
        data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
        assert (decode_image(data) > 250).all()


def test_threads_decode_at_the_same_time() -> None:
    images = [encode(Image.fromarray(np.roll(make_noise(), shift)), "PNG") for shift in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for shift, pixels in enumerate(pool.map(decode_image, images)):
            np.testing.assert_array_equal(pixels, np.roll(make_noise(), shift))


def test_pillow_is_silent_in_every_thread() -> None:
    # Threads decode metadata that cause a warning of Pillow, in a process that shows every warning.
    exif = Image.Exif()
    exif[0x0112] = 1
    data = bytearray(encode(make_quadrants(), "JPEG", exif=exif))
    tag = data.index(b"\x01\x12\0\x03")
    # The tag states a million values.
    data[tag + 4 : tag + 8] = struct.pack(">I", 1 << 20)
    program = (
        "import sys, warnings\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from semiscale.data.image_decoding import decode_image\n"
        "data = sys.stdin.buffer.read()\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(sum(pixels.size for pixels in pool.map(decode_image, [data] * 50)))\n"
    )
    command = [sys.executable, "-W", "always", "-c", program]
    process = subprocess.run(command, input=bytes(data), capture_output=True, check=True)
    assert int(process.stdout) == 50 * 64 * 32 * 3
    assert process.stderr == b""
    # Check that Pillow does warn about this tag.
    with pytest.warns(UserWarning, match="Tag data larger than file"), Image.open(io.BytesIO(data)) as image:
        image.getexif().get(0x0112)
