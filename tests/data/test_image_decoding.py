"""Decoding: what is shown of every kind of image, and the reason where nothing can be."""

import io
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from semiscale.data.image_decoding import MAX_PIXELS, DecodeError, decode_image

Array = NDArray[Any]

# decode.py silences Pillow for the process; pytest puts its own filters before that. That it does without pytest is
# tested in a process of its own, below.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 32, channels: int = 3) -> Array:
    """Return random pixels, which leave no redundancy to decode a damaged file by."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def smooth() -> Array:
    """Return a picture that lossy formats keep: a gradient in each direction."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 3, 255 - rows * 4], axis=-1).astype(np.uint8)


def quadrants(mode: str = "RGB") -> Image.Image:
    """Return a picture whose four corners tell every rotation and mirroring apart, twice as wide as high."""
    image = Image.new("RGB", (64, 32), WHITE)
    image.paste(RED, (0, 0, 32, 16))
    image.paste(GREEN, (32, 0, 64, 16))
    image.paste(BLUE, (0, 16, 32, 32))
    return image.convert(mode)


def assert_close(found: Array, expected: Array, tolerance: int = 12) -> None:
    assert found.shape == expected.shape
    assert int(np.abs(found.astype(int) - expected.astype(int)).max()) <= tolerance


def png(width: int, height: int, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a PNG as its specification composes it, with whatever it claims to be."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def png16(colours: int, pixels: list[list[int]], clear: list[int]) -> bytes:
    """Return a PNG of 16 bits a channel, one row, with one colour that is transparent."""
    return png_with_a_clear_colour(
        len(pixels), (16, 0 if colours == 1 else 2), np.array(pixels, ">u2").tobytes(), clear
    )


def png_with_a_clear_colour(width: int, bits_and_kind: tuple[int, int], row: bytes, clear: list[int]) -> bytes:
    """Return a PNG of one row and of so many bits a channel, with one colour that is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, *bits_and_kind, 0, 0, 0))
    tag = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + tag + pixels + chunk(b"IEND", b"")


def test_a_transparent_colour_of_16_bits_is_white() -> None:
    assert decode_image(png16(1, [[0], [40000]], [40000])).tolist() == [[[0] * 3, [255] * 3]]
    assert decode_image(png16(3, [[256, 512, 768], [40000, 0, 0]], [40000, 0, 0])).tolist() == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize(("bits", "row", "shown"), [(2, 0b00_01_10_11, [0, 255, 170]), (4, 0x01, [0, 255])])
def test_a_transparent_gray_of_few_bits_is_white(bits: int, row: int, shown: list[int]) -> None:
    found = decode_image(png_with_a_clear_colour(len(shown), (bits, 0), bytes([row]), [1]))
    assert found[0, :, 0].tolist() == shown


class TestFormats:
    @pytest.mark.parametrize("format", ["JPEG", "WEBP"])
    def test_lossy(self, format: str) -> None:
        assert_close(decode_image(encode(Image.fromarray(smooth()), format, quality=95)), smooth())

    @pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
    def test_lossless(self, format: str, options: dict[str, Any]) -> None:
        pixels = decode_image(encode(Image.fromarray(noise()), format, **options))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, noise())

    def test_progressive_jpeg(self) -> None:
        assert_close(decode_image(encode(Image.fromarray(smooth()), "JPEG", quality=95, progressive=True)), smooth())

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_gray(self, format: str) -> None:
        gray = Image.fromarray(smooth()).convert("L")
        pixels = decode_image(encode(gray, format))
        assert_close(pixels, np.asarray(gray.convert("RGB")))
        assert (pixels[..., 0] == pixels[..., 1]).all()

    def test_cmyk_jpeg(self) -> None:
        # The ImageNet of 2012 has 22 of them.
        assert_close(decode_image(encode(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)), smooth(), 25)

    def test_black_and_white(self) -> None:
        pixels = decode_image(encode(Image.fromarray(noise()).convert("1"), "PNG"))
        assert set(np.unique(pixels)) == {0, 255}

    def test_palette(self) -> None:
        np.testing.assert_array_equal(decode_image(encode(quadrants("P"), "PNG")), np.asarray(quadrants()))

    def test_one_pixel(self) -> None:
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
            assert decode_image(encode(Image.new("RGB", (1, 1), WHITE), format)).tolist() == [[[255, 255, 255]]]

    @pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "EPS", "PDF"])
    def test_other_formats_are_not_tried(self, format: str) -> None:
        with pytest.raises(DecodeError, match=r"^not an image$"):
            decode_image(encode(Image.fromarray(noise()), format))


class TestSixteenBits:
    def test_gray_is_the_high_byte(self) -> None:
        values = np.random.default_rng(1).integers(0, 65536, (24, 32)).astype(np.uint16)
        pixels = decode_image(encode(Image.fromarray(values), "PNG"))
        np.testing.assert_array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))

    def test_colour_is_the_high_byte(self) -> None:
        values = np.random.default_rng(1).integers(0, 65536, (4, 5, 3)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        data = bytearray(png(5, 4, rows))
        data[24] = 16  # bits a channel, in the header, whose checksum follows
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        np.testing.assert_array_equal(decode_image(bytes(data)), (values >> 8).astype(np.uint8))


class TestTransparency:
    def test_it_is_shown_on_white(self) -> None:
        image = Image.new("RGBA", (3, 1))
        image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 255, 51)])
        for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True, "exact": True}):
            assert decode_image(encode(image, **options)).tolist() == [[list(RED), list(WHITE), [204, 204, 255]]]

    def test_gray_with_alpha(self) -> None:
        image = Image.new("LA", (2, 1))
        image.putdata([(0, 255), (0, 0)])
        assert decode_image(encode(image, "PNG")).tolist() == [[list(BLACK), list(WHITE)]]

    def test_a_palette_with_alpha(self) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        alphas = bytes([255, 0, 51])
        assert decode_image(encode(image, "PNG", transparency=alphas)).tolist() == [
            [list(RED), list(WHITE), [204, 204, 255]]
        ]

    @pytest.mark.parametrize("format", ["PNG", "GIF"])
    def test_a_palette_with_one_transparent_colour(self, format: str) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *GREEN])
        image.putdata([0, 1])
        assert decode_image(encode(image, format, transparency=1)).tolist() == [[list(RED), list(WHITE)]]

    def test_one_transparent_colour(self) -> None:
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), BLUE)
        assert decode_image(encode(image, "PNG", transparency=BLUE)).tolist() == [[list(RED), list(WHITE)]]
        gray = Image.new("L", (2, 1), 0)
        gray.putpixel((1, 0), 9)
        assert decode_image(encode(gray, "PNG", transparency=9)).tolist() == [[list(BLACK), list(WHITE)]]


class TestExif:
    # Where the stored corners are shown, by the value of the tag (EXIF 2.32, section 4.6.4): what is stored in the
    # first row is shown at the top, right, bottom or left, and likewise the first column.
    SHOWN = (
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
    @pytest.mark.parametrize(("orientation", "first_row", "first_column"), SHOWN)
    def test_the_rotation_is_applied(self, format: str, orientation: int, first_row: str, first_column: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = decode_image(encode(quadrants(), format, exif=exif, **({"quality": 95} if format == "JPEG" else {})))
        assert pixels.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
        # The red quadrant is stored where the first row meets the first column, green beside it in the first row.
        assert_close(_corner(pixels, {first_row, first_column}), np.array(RED), 40)
        assert_close(_corner(pixels, {first_row, _OPPOSITE[first_column]}), np.array(GREEN), 40)
        assert_close(_corner(pixels, {_OPPOSITE[first_row], first_column}), np.array(BLUE), 40)

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_a_photograph_with_exif_has_pillows_pixels_and_is_reduced_as_it_is_shown(
        self, orientation: int, mode: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(smooth()[:41, :63]).convert(mode), "JPEG", exif=exif, quality=90)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode_image(data), np.asarray(shown.convert("RGB")))
        asked: list[tuple[int, int]] = []

        def by_two(height: int, width: int) -> int:
            asked.append((height, width))
            return 2

        reduced = decode_image(data, by_two)
        assert asked == [(shown.height, shown.width)]
        assert reduced.shape == (-(-shown.height // 2), -(-shown.width // 2), 3)
        assert_close(reduced, np.asarray(shown.convert("RGB").reduce(2)), 8)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_a_rotation_that_is_none(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode_image(encode(quadrants(), "PNG", exif=exif)), np.asarray(quadrants()))

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" * 9]
    )
    def test_damaged_metadata_do_not_matter(self, exif: bytes) -> None:
        assert_close(decode_image(encode(Image.fromarray(smooth()), "JPEG", exif=exif, quality=95)), smooth())


_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def _corner(pixels: Array, sides: set[str]) -> Array:
    """Return a pixel well inside the corner between two sides."""
    height, width = pixels.shape[:2]
    pixel: Array = pixels[6 if "top" in sides else height - 7, 6 if "left" in sides else width - 7]
    return pixel


class TestSeveralFrames:
    @pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {})])
    def test_the_first_is_shown(self, format: str, options: dict[str, Any]) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
        assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
        assert np.unique(decode_image(data).reshape(-1, 3), axis=0).tolist() == [list(RED)]

    def test_the_first_that_moves_is_shown_not_the_still_for_those_that_cannot_animate(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
        assert np.unique(decode_image(data).reshape(-1, 3), axis=0).tolist() == [list(GREEN)]
        without = data[: data.index(b"fcTL") - 4] + data[data.index(b"IEND") - 4 :]
        assert np.unique(decode_image(without).reshape(-1, 3), axis=0).tolist() == [list(RED)]

    def test_canvas_that_a_gifs_first_frame_leaves_uncovered_is_white(self) -> None:
        data = bytearray(encode(Image.new("P", (2, 1), 0), "GIF"))
        frame = data.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 2, 1))
        data[6:10] = struct.pack("<HH", 4, 2)  # the canvas
        data[frame + 1 : frame + 3] = struct.pack("<H", 1)  # left
        assert decode_image(bytes(data))[..., 0].tolist() == [[255, 0, 0, 255], [255] * 4]

    def test_a_stereo_jpeg(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (WHITE, BLACK)]
        data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
        assert (decode_image(data) > 250).all()


class TestUndecodable:
    @pytest.mark.parametrize(
        "data", [b"", b"\0", b"plain text\n" * 100, b"<html></html>", b"\xff\xd8", b"RIFF\0\0\0\0WEBP"]
    )
    def test_what_is_not_an_image(self, data: bytes) -> None:
        with pytest.raises(DecodeError, match=r"^(not an|damaged) image$"):
            decode_image(data)

    @pytest.mark.parametrize("data", [b"", b"plain text\n" * 100, b"<html></html>", b"RIFF\0\0\0\0WAVE"])
    def test_its_reason(self, data: bytes) -> None:
        with pytest.raises(DecodeError, match=r"^not an image$"):
            decode_image(data)

    @pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"quality": 20}])
    def test_a_jpeg_cut_anywhere_is_damaged(self, options: dict[str, Any]) -> None:
        # Down to the last byte: a viewer would show the rest in gray, which would be scored as if it were a picture.
        data = encode(Image.fromarray(noise()), "JPEG", **options)
        for cut in range(4, len(data)):
            with pytest.raises(DecodeError, match=r"^damaged image$"):
                decode_image(data[:cut])

    @pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})])
    def test_other_cut_images_are_damaged(self, format: str, options: dict[str, Any]) -> None:
        data = encode(Image.fromarray(noise()), format, **options)
        for share in (0.05, 0.1, 0.3, 0.5, 0.9):
            with pytest.raises(DecodeError, match=r"^damaged image$"):
                decode_image(data[: int(len(data) * share)])

    def test_a_png_without_its_last_bytes_is_whole(self) -> None:
        # All pixels are there: only the mark of the end is missing.
        np.testing.assert_array_equal(decode_image(encode(Image.fromarray(noise()), "PNG")[:-4]), noise())

    @pytest.mark.parametrize(
        "size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1), (1, 2 * MAX_PIXELS)]
    )
    def test_a_decompression_bomb_is_refused_by_its_header(self, size: tuple[int, int]) -> None:
        with pytest.raises(DecodeError, match=f"^more than {MAX_PIXELS} pixels$"):
            decode_image(png(*size))

    def test_a_bomb_of_scans_is_refused_by_its_header(self) -> None:
        image = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
        bomb = image[:-2] + image[image.rindex(b"\xff\xda") : -2] * 1000 + image[-2:]
        assert (decode_image(image) == 0).all()
        with pytest.raises(DecodeError, match=r"^a JPEG of too many scans$"):
            decode_image(bomb)

    def test_what_looks_like_scans_behind_a_photograph_does_not_matter(self) -> None:
        # Telephones append videos.
        image = encode(Image.fromarray(smooth()), "JPEG", quality=95) + b"\xff\xda" * 2_000_000
        assert_close(decode_image(image), smooth())

    def test_a_bomb_in_the_metadata(self) -> None:
        text = b"comment\0\0" + zlib.compress(bytes(50 << 20), 1)
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        with pytest.raises(DecodeError, match=r"^damaged image$"):
            decode_image(png(1, 1, b"\0\1\2\3", chunk))

    @pytest.mark.parametrize("kind", ["EXIF of a JPEG", "fill of a JPEG", "texts of a PNG", "comments of a GIF"])
    def test_a_flood_of_headers_is_given_up(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A megabyte of them, for a limit that is as much lower as that is below the largest image; of the first kind
        five, which Pillow joined for half a minute, in the square of their number.
        """
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

    def test_a_rotation_in_the_second_piece_of_the_exif(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        pieces = [b"Exif\0\0" + part for part in (exif.tobytes()[6:12], exif.tobytes()[12:])]
        segments = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(piece)) + piece for piece in pieces)
        image = encode(quadrants(), "JPEG")
        assert decode_image(image[:2] + segments + image[2:]).shape == (64, 32, 3)

    def test_an_image_without_pixels(self) -> None:
        for size in ((0, 0), (0, 9), (9, 0)):
            with pytest.raises(DecodeError):
                decode_image(png(*size))

    def test_random_damage_has_a_reason(self) -> None:
        # What Pillow raises for damage is not documented. A minute of this found nothing else either.
        rng = random.Random(0)
        image = Image.fromarray(noise())
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


def test_many_threads_at_once() -> None:
    images = [encode(Image.fromarray(np.roll(noise(), shift)), "PNG") for shift in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for shift, pixels in enumerate(pool.map(decode_image, images)):
            np.testing.assert_array_equal(pixels, np.roll(noise(), shift))


def test_pillow_is_silent_in_every_thread() -> None:
    """Metadata that Pillow warns of, decoded by threads in a process where every warning would be shown."""
    exif = Image.Exif()
    exif[0x0112] = 1
    data = bytearray(encode(quadrants(), "JPEG", exif=exif))
    tag = data.index(b"\x01\x12\0\x03")
    data[tag + 4 : tag + 8] = struct.pack(">I", 1 << 20)  # the tag claims a million values
    program = (
        "import sys, warnings\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from semiscale.data.image_decoding import decode_image\n"
        "data = sys.stdin.buffer.read()\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(sum(pixels.size for pixels in pool.map(decode_image, [data] * 50)))\n"
    )
    command = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(command, input=bytes(data), capture_output=True, check=True)
    assert int(done.stdout) == 50 * 64 * 32 * 3
    assert done.stderr == b""
    with pytest.warns(UserWarning, match="Tag data larger than file"), Image.open(io.BytesIO(data)) as image:
        image.getexif().get(0x0112)  # that Pillow does warn of this one
