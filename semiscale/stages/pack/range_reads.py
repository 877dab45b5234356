"""Ranges: the selected bytes and little else, many requests at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import video_decoding

MAX_CONCURRENT_READS = 32  # requests in flight: hides an object store's latency
# A request takes 30 ms of one reader, so 1 ms of the pod, in which its network brings about half a megabyte: to read
# less than that between two images costs less than to ask twice.
COALESCE_GAP_BYTES = 256 << 10
MAX_RANGE_BYTES = 8 << 20  # of one request, so that the readers share a dense shard

_BEGINNINGS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG", "gif": b"GIF8", "bmp": b"BM"}


class ByteLocation(NamedTuple):
    """Where an image's bytes lie, and in which version of the object, where that is known."""

    uri: str
    offset: int
    size_bytes: int
    version: str = ""

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + self.size_bytes


class ByteRange(NamedTuple):
    """Bytes of one object that are asked for at once, and which of the images lie in them."""

    uri: str
    version: str
    start: int
    end: int
    images: list[int]


def coalesce(places: Sequence[ByteLocation]) -> list[ByteRange]:
    """Put images that lie near each other in one object into one range; every image is in one."""
    found: list[ByteRange] = []
    for number in sorted(range(len(places)), key=lambda number: places[number]):
        place = places[number]
        last = found[-1] if found else None
        if last and can_coalesce(last, place):
            last.images.append(number)
            found[-1] = last._replace(end=max(last.end, place.end))
        else:
            found.append(ByteRange(place.uri, place.version, place.offset, place.end, [number]))
    return found


def can_coalesce(last: ByteRange, place: ByteLocation) -> bool:
    """Say whether an image is better read together with the range before it."""
    near = place.uri == last.uri and place.offset <= last.end + COALESCE_GAP_BYTES
    return near and place.end - last.start <= MAX_RANGE_BYTES


def read_images(places: Sequence[ByteLocation]) -> list[bytes]:
    """Read images by their places. Raises SemiscaleError where an object is gone or of another version, or where there
    is no image any more.

    Memory: the images, and READERS ranges.
    """
    images = [b""] * len(places)
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        for found in pool.map(lambda one: list(_cut(one, places)), coalesce(places)):
            for number, image in found:
                images[number] = image
    return images


def _cut(one: ByteRange, places: Sequence[ByteLocation]) -> Iterator[tuple[int, bytes]]:
    try:
        data = storage.read_bytes(one.uri, one.start, one.end - one.start, one.version)
    except FileNotFoundError:
        raise SemiscaleError(
            "SEMI-E320", f"{one.uri}: The object disappeared after it was scored. Put it back, or run the plan again."
        ) from None
    for number in one.images:
        place = places[number]
        image = data[place.offset - one.start : place.end - one.start]
        if len(image) != place.size_bytes or not detect_extension(image):
            raise SemiscaleError(
                "SEMI-E321",
                f"{one.uri}, byte {place.offset}: The object changed after it was scored. Run the plan again.",
            )
        yield number, image


def detect_extension(image: bytes) -> str:
    """Name an image's or a video's format by its first bytes, WebM mkv; "" for what is neither."""
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return next(
        (name for name, beginning in _BEGINNINGS.items() if image.startswith(beginning)),
        video_decoding.detect_container(image),
    )
