"""Images with known pixels for the tests of decoding, in many formats."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return an image in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_noise(height: int = 24, width: int = 32, channels: int = 3) -> Array:
    """Return random pixels.

    They have no redundancy, so no decoder can guess the missing part of a damaged file.
    """
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def make_gradients() -> Array:
    """Return a gradient in each direction, which lossy formats preserve."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 3, 255 - rows * 4], axis=-1).astype(np.uint8)


def make_quadrants(mode: str = "RGB") -> Image.Image:
    """Return an image of 64 x 32 pixels with corners of four colours.

    Each rotation and each reflection of it looks different.
    """
    image = Image.new("RGB", (64, 32), WHITE)
    image.paste(RED, (0, 0, 32, 16))
    image.paste(GREEN, (32, 0, 64, 16))
    image.paste(BLUE, (0, 16, 32, 32))
    return image.convert(mode)


def assert_close(actual: Array, expected: Array, tolerance: int = 12) -> None:
    """Assert that shapes are equal and that no value differs by more than a tolerance."""
    assert actual.shape == expected.shape
    assert int(np.abs(actual.astype(int) - expected.astype(int)).max()) <= tolerance


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width: int, height: int, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a PNG whose header may contradict its pixels.

    Args:
        width: The width that the header states.
        height: The height that the header states.
        pixels: Rows of RGB bytes, each after its filter byte.
        extra: More chunks, placed before the pixels.
    """
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + png_chunk(b"IEND", b"")
