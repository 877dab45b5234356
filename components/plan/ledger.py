"""The ledger of the unlabeled pool: its shards, grouped into units whose scores are ranked and merged as one.

Which unit a shard falls into is decided by a hash of its name, so that no unit collects one kind of image. A unit, once
formed, is kept as long as its shards are unchanged: a pool that grows adds units and leaves the finished ones alone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from components.shared import shards as sharding
from components.shared import storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.progress import say
from components.shared.scores import MOST_IMAGES
from components.shared.shards import Columns, Shard, Unit
from components.shared.stage import digest

# The merge reads about K / units ranks of each class from each unit, and some more for chance: the fewer the units, the
# less of the latter. With the paper's K / pool, and a pool ten times as large, eight million images leave K / units
# above 12, where what is read is below three times what wins. More would cost a pod too much memory to seal a unit;
# one that turns out to have many more, because its images are of many sizes, is sealed in pieces.
IMAGES_PER_UNIT = 8_000_000
PROBED_SHARDS = 8  # opened to learn how large an image is
READERS = 32  # footers read at once: hides an object store's latency

Found = TypeVar("Found")


def draw_up(uris: list[str], workdir: str, columns: Columns) -> list[Unit]:
    """List the pool and group it into units, in order of their digests. Raises Refused where a URI holds nothing.

    Memory: about 1 kB a tar or Parquet file, 100 MB for a billion images in shards of 10,000; of loose files 700 bytes
    each, so 700 GB for a billion: pack them into tars first, from some tens of millions on.
    """
    folder = storage.join(workdir, "stages", "plan", "units")
    earlier = _kept_units(folder)
    shards = {shard.digest(): shard for shard in _cut(sharding.find(uris, columns.videos), set(chain(*earlier)))}
    if len(uris) > 1:
        refuse_twice(shards.values())
    kept = [unit for unit in earlier if all(member in shards for member in unit)]
    assigned: set[str] = set()
    units: list[list[str]] = []
    for unit in kept:
        if assigned.isdisjoint(unit):
            units.append(unit)
            assigned.update(unit)
    fresh = _grouped([shard for member, shard in shards.items() if member not in assigned], columns)
    for unit in fresh:
        storage.write(storage.join(folder, f"{digest(unit)}.json"), json.dumps(unit).encode())
    return sorted(
        (Unit(digest=digest(unit), shards=[shards[member] for member in unit]) for unit in [*units, *fresh]),
        key=lambda unit: unit.digest,
    )


def refuse_none(unlabeled: list[str]) -> None:
    """Raise Refused where a run has nothing to select from; `transfer` and `measure` do without."""
    if not unlabeled:
        raise Refused("unlabeled: empty; expected the URIs of the images to select from")


def refuse_twice(shards: Iterable[Shard]) -> None:
    """Raise Refused where a loose file is in two shards, one URI lying below another: it would be selected twice.

    A tar or a Parquet file that is listed twice is one shard.
    """
    seen: set[str] = set()
    for file in chain.from_iterable(shard.files for shard in shards):
        if file.uri in seen:
            raise Refused(f"unlabeled: {file.uri} lies below two of the URIs; leave one of them out")
        seen.add(file.uri)


def _kept_units(folder: str) -> list[list[str]]:
    return [json.loads(storage.read(entry.uri)) for entry in storage.entries(folder) if entry.uri.endswith(".json")]


def _cut(shards: list[Shard], known: set[str]) -> list[Shard]:
    """Cut Parquet files of many rows, such as lists of links; what an earlier plan kept whole is not opened again.

    Costs one look at the footer of each new file above sharding.MANY_ROWS_BYTES.
    """
    fresh = [shard for shard in shards if shard.digest() not in known]
    with ThreadPoolExecutor(READERS) as pool:
        slices = pool.map(lambda shard: _unless_damaged(sharding.slices, shard), fresh)
        pieces = dict(zip((shard.digest() for shard in fresh), slices, strict=True))
    return [piece for shard in shards for piece in pieces.get(shard.digest()) or [shard]]


def _grouped(shards: list[Shard], columns: Columns) -> list[list[str]]:
    density = images_per_byte(shards, columns)
    for shard in shards:
        if shard.size_bytes * density > MOST_IMAGES:
            _warn_of(shard, columns)
    images = density * sum(shard.size_bytes for shard in shards)
    count = math.ceil(images / IMAGES_PER_UNIT) or 1
    groups: dict[int, list[str]] = {}
    for shard in shards:
        place = int.from_bytes(hashlib.blake2b(shard.name.encode(), digest_size=8).digest(), "big") % count
        groups.setdefault(place, []).append(shard.digest())
    return [sorted(group) for group in groups.values()]


def _warn_of(shard: Shard, columns: Columns) -> None:
    """Say that a shard is too large to be ranked in bounded memory, if it looks so itself; it cannot be cut."""
    images = _unless_damaged(sharding.estimated_images, shard, columns) or 0
    if images > MOST_IMAGES:
        say(
            "plan",
            f"{shard.uri}: about {images:,.0f} images in one shard; one pod scores it, and takes 0.85 GB a million to "
            f"rank it; write it as several files of at most {MOST_IMAGES:,} images",
        )


def images_per_byte(shards: list[Shard], columns: Columns) -> float:
    """Estimate how many images the pool has in a byte, from the beginnings of a few of its shards, evenly spread.

    Raises Refused where one of them is not of the format that its name says, or lacks the image column.
    """
    images = size_bytes = 0.0
    for shard in shards[:: max(len(shards) // PROBED_SHARDS, 1)]:
        found = _unless_damaged(sharding.estimated_images, shard, columns)
        if found is not None:
            images += found
            size_bytes += shard.size_bytes
    return images / size_bytes if size_bytes else 0.0


def _unless_damaged(look: Callable[..., Found], shard: Shard, *columns: Columns) -> Found | None:
    """Look into a shard. A damaged one tells nothing here; the scan will name it. Raises Refused."""
    try:
        return look(shard, *columns)
    except Refused:
        raise
    except (SemiscaleError, OSError):
        return None
