"""Decode image bytes to the RGB pixels that a viewer displays, or give a reason.

Pillow decides whether data is an image. Plain JPEG files are most of any pool. libjpeg-turbo decodes them without
Pillow, through https://gitlab.com/jfolz/simplejpeg. The pixels are the same in two thirds of the time, or in half of it
for a photograph with EXIF. Pillow decodes every unusual file, such as CMYK or a damaged one, so that there is one
behaviour.
"""

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from semiscale.common.errors import SemiscaleError

ImageArray = NDArray[np.uint8]  # images_HWC, RGB

# Pillow reads dozens of formats. Its EPS reader runs Ghostscript, and bugs in rare decoders are found last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# The first bytes of an image whose header may be cut off.
_BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8", re.DOTALL)

# Pillow's own threshold for a warning: a quarter of a GiB of RGB. Only photographs of the largest sensors are above it.
# Decoding was measured to take up to 16 bytes a pixel in each thread, 1.4 GB at this limit. Pillow itself refuses twice
# as many pixels.
MAX_PIXELS = 89_478_485
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"

# A progressive JPEG decodes all pixels once per scan, and a few bytes can declare thousands of scans. This limits the
# pixels of all scans together, half a minute of a slow core at worst. Cameras and web sites write about ten scans.
MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
_TOO_MANY_SCANS = "a JPEG of too many scans"

# A file may consist of headers of one or two bytes. Pillow reads them one by one, at a microsecond a byte, and keeps
# them in lists. A photograph takes hundreds of reads, and the largest PNG in chunks of 4 KB takes 700,000. This limit
# takes a second and 100 MB.
MAX_READS = 1 << 20
# 4 MB of EXIF. Pillow joins the pieces one by one, in quadratic time.
MAX_EXIF_PIECES = 64
# A JPEG with more segments is left to Pillow.
MAX_SEGMENTS = 4096
_TOO_MANY_PIECES = "too many pieces of metadata"

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
# Frame types whose scans cost no more than their bytes suggest.
_SEQUENTIAL = (b"\xc0", b"\xc1", b"\xc3")
_SCAN = b"\xff\xda"
_PLAIN_COLOURS = ("YCbCr", "Gray", "RGB")
# Marks of EXIF, and of the orientation in XMP.
_ORIENTATION_MARKS = (_EXIF, b"Orientation")

# The EXIF tag, and the transposition for each of its values. Value 1 needs none.
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Transpositions that exchange height and width.
_SIDEWAYS = (_TRANSPOSES[5], _TRANSPOSES[6], _TRANSPOSES[7], _TRANSPOSES[8])

# The chunk of the further frames of an animated PNG.
_APNG_FRAME_CHUNK = b"fdAT"
# The value of white in a gray PNG of two and four bits, by Pillow's name of the raw mode.
_WHITE_LEVELS = {"L;2": 3, "L;4": 15}

# Pillow warns of unusual metadata, but only the pixels matter here. Too large images are refused below. The filter
# holds for the whole process, because `warnings.catch_warnings` is not thread-safe and threads decode.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(Exception):
    """The bytes cannot be decoded. The message is the reason, and equal causes have equal reasons."""


def describe_decode_error(error: Exception, image: str) -> str:
    """Return why an image has no pixels, for expected and unexpected errors.

    Args:
        error: The error of a decoder.
        image: The name of the image, for the message of a raised error.

    Returns:
        The reason. Equal causes have equal reasons.

    Raises:
        SemiscaleError: The image is not at fault, because memory is missing.
    """
    if isinstance(error, MemoryError):
        raise SemiscaleError(
            "SEMI-E062", f"{image}: There is not enough memory to decode it. Give the pod more memory."
        ) from None
    return str(error) if isinstance(error, DecodeError) else f"cannot be decoded: {type(error).__name__}"


def decode_image(data: bytes, reduction: Callable[[int, int], int] = lambda height, width: 1) -> ImageArray:
    """Decode JPEG, PNG, WebP, GIF or BMP to RGB pixels.

    Grayscale, palette and CMYK are converted without colour profiles. The upper 8 of 16 bits are taken. Transparent
    pixels are put on white. The EXIF rotation is applied. The first frame of an animation is taken.

    Args:
        data: The encoded image.
        reduction: A function of height and width. It returns the divisor of the size of a plain JPEG: 1, 2, 4 or 8. The
            reduced height and width are rounded up. Decoding then costs half or less. Other files keep their size.

    Returns:
        image_HWC, RGB, uint8.

    Raises:
        DecodeError: The data is damaged, is not an image, or is above a limit of this module.
    """
    pixels = _decode_baseline_jpeg(data, reduction)
    return np.array(_to_rgb(_apply_exif_rotation(_load(data)))) if pixels is None else pixels


def _decode_baseline_jpeg(data: bytes, reduction: Callable[[int, int], int]) -> ImageArray | None:
    """Decode a plain JPEG that may be rotated. Return None for any other file.

    With `strict`, a warning of libjpeg is an error here. The most frequent one is a file that is cut off.
    """
    scan_offset, is_sequential = _find_first_scan(data)
    header = _read_plain_header(data, is_sequential) if scan_offset else None
    if header is None:
        return None
    height, width, _ = header
    try:
        transpose = (
            _exif_transpose_of(Image.open(_LimitedReader(data), formats=("JPEG",)))
            if _may_have_exif_rotation(data, scan_offset)
            else None
        )
    except MemoryError:
        raise
    # Pillow decodes the file next and reports the problem.
    except Exception:  # noqa: BLE001
        return None
    divisor = reduction(*((width, height) if transpose in _SIDEWAYS else (height, width)))
    try:
        pixels: ImageArray = simplejpeg.decode_jpeg(
            data,
            "RGB",
            strict=True,
            min_height=-(-height // divisor),
            min_width=-(-width // divisor),
            min_factor=divisor,
        )
    except ValueError:
        return None
    return pixels if transpose is None else np.array(Image.fromarray(pixels).transpose(transpose))


def baseline_jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Return height, width and colour space of a plain JPEG by its header.

    Any other file, and a JPEG that may be rotated, gives None.
    """
    scan_offset, is_sequential = _find_first_scan(data)
    if not scan_offset or _may_have_exif_rotation(data, scan_offset):
        return None
    return _read_plain_header(data, is_sequential)


def _may_have_exif_rotation(data: bytes, scan_offset: int) -> bool:
    """Return whether the header of a JPEG mentions a rotation.

    Pillow looks only into the header too. A search of all bytes would hold the GIL, which limits all threads to about
    two thousand images a second on any number of cores.
    """
    return any(mark in data[:scan_offset] for mark in _ORIENTATION_MARKS)


def _read_plain_header(data: bytes, is_sequential: bool) -> tuple[int, int, str] | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError:
        return None
    is_within_limits = height * width <= MAX_PIXELS and (
        is_sequential or _pixels_times_scans(data, height * width) <= MAX_SCANNED_PIXELS
    )
    return (height, width, colours) if colours in _PLAIN_COLOURS and is_within_limits else None


def _find_first_scan(data: bytes) -> tuple[int, bool]:
    """Return the offset of the first scan of a JPEG, and whether it is sequential.

    The offset is 0 if it is unknown. The scans of a sequential JPEG cost no more than their bytes suggest.
    """
    offset, is_sequential = len(_JPEG) - 1, False
    for _ in range(MAX_SEGMENTS if data.startswith(_JPEG) else 0):
        start, marker = data[offset : offset + 1], data[offset + 1 : offset + 2]
        if start != b"\xff":
            break
        if marker in (_SCAN[1:], b"\xff"):
            return (0 if marker == b"\xff" else offset), is_sequential
        is_sequential |= marker in _SEQUENTIAL
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 0, is_sequential


def _pixels_times_scans(data: bytes, pixels: int) -> int:
    """Return the pixels that all scans of a JPEG decode together.

    A sequential JPEG counts once, because its scans cost no more than their bytes suggest.
    """
    return pixels if _find_first_scan(data)[1] else pixels * data.count(_SCAN)


class _LimitedReader(io.BytesIO):
    """The bytes of an image, with a limit on the number of reads."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = self._exif_pieces = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes, and raise DecodeError above MAX_READS or MAX_EXIF_PIECES."""
        data = super().read(size)
        self._reads += 1
        self._exif_pieces += data.startswith(_EXIF)
        if self._reads > MAX_READS or self._exif_pieces > MAX_EXIF_PIECES:
            raise DecodeError(_TOO_MANY_PIECES)
        return data


def _load(data: bytes) -> Image.Image:
    try:
        file = Image.open(_LimitedReader(data), formats=FORMATS)
        if file.width * file.height > MAX_PIXELS:
            raise DecodeError(_TOO_LARGE)
        if data.startswith(_JPEG) and _pixels_times_scans(data, file.width * file.height) > MAX_SCANNED_PIXELS:
            raise DecodeError(_TOO_MANY_SCANS)
        return _load_first_frame(file, data)
    except (DecodeError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise DecodeError(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise DecodeError("damaged image" if _BEGINNING.match(data) else "not an image") from None
    # Pillow's decoders report damage by many types of exceptions.
    except Exception:  # noqa: BLE001
        raise DecodeError("damaged image") from None


def _load_first_frame(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Load the first frame as viewers display it. Pillow differs in three cases."""
    # An animated PNG may contain a still image for viewers that cannot animate.
    if image.info.get("default_image") and _APNG_FRAME_CHUNK in data:
        image.seek(1)
    _, box, _, levels = image.tile[0] if image.tile else ("", None, 0, "")
    image.load()
    # The transparent gray of a PNG is stored in the levels of the file, but Pillow expects it in 8 bits.
    if levels in _WHITE_LEVELS and "transparency" in image.info:
        image.info["transparency"] *= 255 // _WHITE_LEVELS[levels]
    # The first frame of a GIF may cover a part of the canvas.
    if image.format != "GIF" or box == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


def _apply_exif_rotation(image: Image.Image) -> Image.Image:
    transpose = _exif_transpose_of(image)
    return image if transpose is None else image.transpose(transpose)


def _exif_transpose_of(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that the metadata of an image asks for."""
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    # Viewers ignore damaged metadata and display the image as it is stored.
    except Exception:  # noqa: BLE001
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent pixels on white."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        # Pillow clips 16 bits when it converts. Viewers take the high byte.
        deep = np.asarray(image)
        gray = np.where(deep == transparent, 255, deep >> 8) if isinstance(transparent, int) else deep >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow has reduced the pixels of 16 bits to 8, but not the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
