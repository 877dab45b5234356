"""Read the selected images by their byte ranges, with many requests at a time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import video_decoding

# Requests at the same time, to hide the latency of an object store.
MAX_CONCURRENT_READS = 32
# A request takes 30 ms of one thread, which is 1 ms of the pod. The network transfers about half a megabyte in this
# time. Reading a smaller gap between two images costs less than a second request.
COALESCE_GAP_BYTES = 256 << 10
# The largest request. It lets several threads share a shard with many selected images.
MAX_RANGE_BYTES = 8 << 20

_MAGIC_BYTES = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG", "gif": b"GIF8", "bmp": b"BM"}


class ByteLocation(NamedTuple):
    """The location of an image.

    Attributes:
        uri: The object that has the image.
        offset: The first byte of the image.
        size_bytes: The number of its bytes.
        version: The version of the object, or "" if it is not checked.
    """

    uri: str
    offset: int
    size_bytes: int
    version: str = ""

    @property
    def end(self) -> int:
        """Return the end of the image's bytes."""
        return self.offset + self.size_bytes


class ByteRange(NamedTuple):
    """Bytes of one object that are read with one request.

    Attributes:
        uri: The object.
        version: Its version, or "" if it is not checked.
        start: The first byte.
        end: The end of the bytes.
        images: The numbers of the images that lie in the range.
    """

    uri: str
    version: str
    start: int
    end: int
    images: list[int]


def coalesce(locations: Sequence[ByteLocation]) -> list[ByteRange]:
    """Combine images that are close to each other into ranges.

    Returns:
        Ranges in order of object and offset. Every image lies in one of them.
    """
    ranges: list[ByteRange] = []
    for number in sorted(range(len(locations)), key=lambda number: locations[number]):
        location = locations[number]
        last = ranges[-1] if ranges else None
        if last and can_coalesce(last, location):
            last.images.append(number)
            ranges[-1] = last._replace(end=max(last.end, location.end))
        else:
            ranges.append(ByteRange(location.uri, location.version, location.offset, location.end, [number]))
    return ranges


def can_coalesce(last: ByteRange, location: ByteLocation) -> bool:
    """Return whether an image is read faster together with a range.

    Args:
        last: The range with the images before it.
        location: The location of the image.
    """
    is_near = location.uri == last.uri and location.offset <= last.end + COALESCE_GAP_BYTES
    return is_near and location.end - last.start <= MAX_RANGE_BYTES


def read_images(locations: Sequence[ByteLocation]) -> list[bytes]:
    """Read images by their locations.

    Args:
        locations: The locations of the images.

    Returns:
        The encoded images in the same order.

    Raises:
        SemiscaleError: An object is missing or of another version, or a location has no image any more.

    Cost:
        Memory for the images and `MAX_CONCURRENT_READS` ranges.
    """
    images = [b""] * len(locations)
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        for parts in pool.map(partial(_read_range, locations), coalesce(locations)):
            for number, image in parts:
                images[number] = image
    return images


def _read_range(locations: Sequence[ByteLocation], byte_range: ByteRange) -> list[tuple[int, bytes]]:
    """Read a range and return its images with their numbers."""
    uri, start = byte_range.uri, byte_range.start
    try:
        data = storage.read_bytes(uri, start, byte_range.end - start, byte_range.version)
    except FileNotFoundError:
        raise SemiscaleError(
            "SEMI-E320", f"{uri}: The object disappeared after it was scored. Put it back, or run the plan again."
        ) from None
    parts = []
    for number in byte_range.images:
        location = locations[number]
        image = data[location.offset - start : location.end - start]
        if len(image) != location.size_bytes or not detect_extension(image):
            raise SemiscaleError(
                "SEMI-E321",
                f"{uri}, byte {location.offset}: The object changed after it was scored. Run the plan again.",
            )
        parts.append((number, image))
    return parts


def detect_extension(image: bytes) -> str:
    """Return the file extension of an image or a video, by its first bytes.

    Returns:
        The extension, which is mkv for WebM, or "" for any other data.
    """
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return next(
        (name for name, magic in _MAGIC_BYTES.items() if image.startswith(magic)),
        video_decoding.detect_container(image),
    )
