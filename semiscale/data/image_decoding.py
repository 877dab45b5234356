"""Image bytes to pixels: what a viewer shows, as RGB, or a reason why not.

Pillow decides what an image is. Plain JPEG files, most of any pool, are decoded by libjpeg-turbo without it
(https://gitlab.com/jfolz/simplejpeg): the same pixels in two thirds of the time, of a photograph with EXIF in half of
it. Whatever is odd about one of them, CMYK, damage, leaves it to Pillow, so that there is one behaviour.
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

# Of the dozens that Pillow reads: its EPS runs Ghostscript, and the bugs of rare decoders are the last to be found.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8", re.DOTALL)  # an image's, if its header is cut off

# Pillow's own threshold for a warning: a quarter of a GiB of RGB. It holds any camera's photographs but those of the
# largest sensors. Measured, decoding takes up to 16 bytes a pixel in each thread, 1.4 GB at this limit; Pillow itself
# refuses at twice as many.
MAX_PIXELS = 89_478_485
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"

# A progressive JPEG goes over its pixels scan by scan, and few bytes can ask for thousands of scans: as many pixels as
# these are decoded, all scans counted, half a minute of a slow core at worst. Cameras and web sites take about ten.
MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
_TOO_MANY_SCANS = "a JPEG of too many scans"

# A file may be all headers: a byte or two of each keeps Pillow, which reads them one by one, busy for a microsecond a
# byte and fills its lists. A photograph is read in hundreds of pieces, the largest PNG in chunks of 4 KB in 700,000; so
# many take a second and 100 MB. EXIF in pieces is joined piece by piece, in the square of their number.
MAX_READS = 1 << 20
MAX_EXIF_PIECES = 64  # 4 MB of EXIF
MAX_SEGMENTS = 4096  # of a JPEG that is not left to Pillow
_TOO_MANY_PIECES = "too many pieces of metadata"

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_SEQUENTIAL = (b"\xc0", b"\xc1", b"\xc3")  # kinds of frames whose scans cost no more than their bytes say
_SCAN = b"\xff\xda"
_PLAIN = ("YCbCr", "Gray", "RGB")
_MAY_BE_TURNED = (_EXIF, b"Orientation")  # EXIF, and the same in XMP

_ORIENTATION = 0x0112  # the EXIF tag; its values but 1, as stored:
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])

_MOVES = b"fdAT"  # the chunk of a PNG's further frames
_LEVELS = {"L;2": 3, "L;4": 15}  # the white of a gray PNG of two and four bits, by Pillow's name for it

# Pillow warns of odd metadata; the pixels are what counts here, and what is too large is refused below. For the whole
# process, because `warnings.catch_warnings` is not safe among threads, and threads decode.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(Exception):
    """The bytes are not an image that can be shown. The message is the reason, the same for equal causes."""


def describe_decode_error(error: Exception, image: str) -> str:
    """Say why an image has no pixels, also where the error is one that nobody thought of: equal for equal causes.

    Raises SemiscaleError, which names the image, where it is not the image that is at fault.
    """
    if isinstance(error, MemoryError):
        raise SemiscaleError(
            "SEMI-E062", f"{image}: There is not enough memory to decode it. Give the pod more memory."
        ) from None
    return str(error) if isinstance(error, DecodeError) else f"cannot be decoded: {type(error).__name__}"


def decode_image(data: bytes, reduction: Callable[[int, int], int] = lambda height, width: 1) -> ImageArray:
    """Decode JPEG, PNG, WebP, GIF or BMP to RGB pixels, uint8, height x width x 3.

    Grayscale, palette and CMYK are converted, without colour profiles; of 16 bits the upper 8 are taken; transparency
    is shown on white; the EXIF rotation is applied; of an animation the first frame is taken. Raises Undecodable.

    `reduction` is asked, with height and width, by how much a plain JPEG may be reduced: 1, 2, 4 or 8. Such a one has
    the height and width divided by it, rounded up, at half of the cost or less; other files keep their size.
    """
    pixels = _decode_baseline_jpeg(data, reduction)
    return np.array(_to_rgb(_apply_exif_rotation(_load(data)))) if pixels is None else pixels


def _decode_baseline_jpeg(data: bytes, reduction: Callable[[int, int], int]) -> ImageArray | None:
    """Decode a JPEG that has nothing odd about it but, perhaps, a rotation; None for any other file.

    `strict`: what libjpeg would only warn of, a file that is cut off before all, is an error here.
    """
    scans_at, sequential = _find_first_scan(data)
    header = _header(data, sequential) if scans_at else None
    if header is None:
        return None
    height, width, _ = header
    try:
        turn = (
            _exif_transpose_of(Image.open(_LimitedReader(data), formats=("JPEG",)))
            if _may_have_exif_rotation(data, scans_at)
            else None
        )
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what Pillow cannot open it will say again
        return None
    by = reduction(*((width, height) if turn in _SIDEWAYS else (height, width)))
    try:
        pixels: ImageArray = simplejpeg.decode_jpeg(
            data, "RGB", strict=True, min_height=-(-height // by), min_width=-(-width // by), min_factor=by
        )
    except ValueError:
        return None
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def baseline_jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Return height, width and colours of a JPEG that has nothing odd about it, as far as its header tells; None for
    any other file, and for one that may be rotated.
    """
    scans_at, sequential = _find_first_scan(data)
    return _header(data, sequential) if scans_at and not _may_have_exif_rotation(data, scans_at) else None


def _may_have_exif_rotation(data: bytes, scans_at: int) -> bool:
    """Say whether a JPEG's header speaks of a rotation. Only the header is searched, where Pillow looks too: searching
    all of an image's bytes would hold up the other threads, two thousand images a second on any number of cores.
    """
    return any(mark in data[:scans_at] for mark in _MAY_BE_TURNED)


def _header(data: bytes, sequential: bool) -> tuple[int, int, str] | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError:
        return None
    few = height * width <= MAX_PIXELS and (
        sequential or _pixels_times_scans(data, height * width) <= MAX_SCANNED_PIXELS
    )
    return (height, width, colours) if colours in _PLAIN and few else None


def _find_first_scan(data: bytes) -> tuple[int, bool]:
    """Return where a JPEG's first scan begins, 0 where that cannot be told, and whether its scans cost no more than
    their bytes say.
    """
    place, sequential = len(_JPEG) - 1, False
    for _ in range(MAX_SEGMENTS if data.startswith(_JPEG) else 0):
        start, marker = data[place : place + 1], data[place + 1 : place + 2]
        if start != b"\xff":
            break
        if marker in (_SCAN[1:], b"\xff"):
            return (0 if marker == b"\xff" else place), sequential
        sequential |= marker in _SEQUENTIAL
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, sequential


def _pixels_times_scans(data: bytes, pixels: int) -> int:
    """Return the pixels of a JPEG times its scans, as far as these are more than its bytes say."""
    return pixels if _find_first_scan(data)[1] else pixels * data.count(_SCAN)


class _LimitedReader(io.BytesIO):
    """An image's bytes, of which no more pieces are read than an image has."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = self._exif_pieces = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any file does, so many times. Raises Undecodable above that."""
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
    except Exception:  # noqa: BLE001 - Pillow's decoders report damage in every way there is
        raise DecodeError("damaged image") from None


def _load_first_frame(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Load what is shown first, where Pillow and viewers differ: a PNG may hold a still for those that cannot animate,
    the gray that it makes clear counts in the file's own levels, and a GIF's first frame may leave canvas uncovered.
    """
    if image.info.get("default_image") and _MOVES in data:
        image.seek(1)
    _, box, _, levels = image.tile[0] if image.tile else ("", None, 0, "")
    image.load()
    if levels in _LEVELS and "transparency" in image.info:
        image.info["transparency"] *= 255 // _LEVELS[levels]
    if image.format != "GIF" or box == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


def _apply_exif_rotation(image: Image.Image) -> Image.Image:
    turn = _exif_transpose_of(image)
    return image if turn is None else image.transpose(turn)


def _exif_transpose_of(image: Image.Image) -> Image.Transpose | None:
    """Return how an image is to be turned, by its metadata."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata: the image is shown as it is stored, as in a viewer
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        # 16 bits. Pillow clips them when it converts; a viewer shows the high byte.
        deep = np.asarray(image)
        shown = np.where(deep == clear, 255, deep >> 8) if isinstance(clear, int) else deep >> 8
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(
            value >> 8 for value in clear
        )  # as the pixels, which Pillow has cut to 8 bits
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
