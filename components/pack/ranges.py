"""Ranges: the selected bytes and little else, many requests at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from components.shared import clips, storage
from components.shared.errors import SemiscaleError

READERS = 32  # requests in flight: hides an object store's latency
# A request takes 30 ms of one reader, so 1 ms of the pod, in which its network brings about half a megabyte: to read
# less than that between two images costs less than to ask twice.
NEAR_BYTES = 256 << 10
MAX_RANGE_BYTES = 8 << 20  # of one request, so that the readers share a dense shard

_BEGINNINGS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG", "gif": b"GIF8", "bmp": b"BM"}


class Place(NamedTuple):
    """Where an image's bytes lie, and in which version of the object, where that is known."""

    uri: str
    offset: int
    size_bytes: int
    version: str = ""

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + self.size_bytes


class Range(NamedTuple):
    """Bytes of one object that are asked for at once, and which of the images lie in them."""

    uri: str
    version: str
    start: int
    end: int
    images: list[int]


def ranges(places: Sequence[Place]) -> list[Range]:
    """Put images that lie near each other in one object into one range; every image is in one."""
    found: list[Range] = []
    for number in sorted(range(len(places)), key=lambda number: places[number]):
        place = places[number]
        last = found[-1] if found else None
        if last and joins(last, place):
            last.images.append(number)
            found[-1] = last._replace(end=max(last.end, place.end))
        else:
            found.append(Range(place.uri, place.version, place.offset, place.end, [number]))
    return found


def joins(last: Range, place: Place) -> bool:
    """Say whether an image is better read together with the range before it."""
    near = place.uri == last.uri and place.offset <= last.end + NEAR_BYTES
    return near and place.end - last.start <= MAX_RANGE_BYTES


def read(places: Sequence[Place]) -> list[bytes]:
    """Read images by their places. Raises SemiscaleError where an object is gone or of another version, or where there
    is no image any more.

    Memory: the images, and READERS ranges.
    """
    images = [b""] * len(places)
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda one: list(_cut(one, places)), ranges(places)):
            for number, image in found:
                images[number] = image
    return images


def _cut(one: Range, places: Sequence[Place]) -> Iterator[tuple[int, bytes]]:
    try:
        data = storage.read(one.uri, one.start, one.end - one.start, one.version)
    except FileNotFoundError:
        raise SemiscaleError(f"{one.uri}: gone since it was scored; put it back, or run the plan again") from None
    for number in one.images:
        place = places[number]
        image = data[place.offset - one.start : place.end - one.start]
        if len(image) != place.size_bytes or not suffix(image):
            raise SemiscaleError(f"{one.uri}, byte {place.offset}: changed since it was scored; run the plan again")
        yield number, image


def suffix(image: bytes) -> str:
    """Name an image's or a video's format by its first bytes, WebM mkv; "" for what is neither."""
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return next((name for name, beginning in _BEGINNINGS.items() if image.startswith(beginning)), clips.suffix(image))
