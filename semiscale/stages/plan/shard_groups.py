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

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing, parquet_reader, reader
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.observability.progress import log_info
from semiscale.scores.score_file import MAX_IMAGES_PER_RANKING

# The merge reads about K / units ranks of each class from each unit, and some more for chance: the fewer the units, the
# less of the latter. With the paper's K / pool, and a pool ten times as large, eight million images leave K / units
# above 12, where what is read is below three times what wins. More would cost a pod too much memory to seal a unit;
# one that turns out to have many more, because its images are of many sizes, is sealed in pieces.
TARGET_IMAGES_PER_GROUP = 8_000_000
SAMPLED_SHARDS = 8  # opened to learn how large an image is
READERS = 32  # footers read at once: hides an object store's latency

Found = TypeVar("Found")


def build_shard_groups(uris: list[str], workdir: str, columns: SampleFields) -> list[ShardGroup]:
    """List the pool and group it into units, in order of their digests. Raises InvalidInputError where a URI holds
    nothing.

    Memory: about 1 kB a tar or Parquet file, 100 MB for a billion images in shards of 10,000; of loose files 700 bytes
    each, so 700 GB for a billion: pack them into tars first, from some tens of millions on.
    """
    folder = storage.join(workdir, "stages", "plan", "units")
    earlier = _load_existing_groups(folder)
    shards = {
        shard.digest(): shard
        for shard in _split_large_parquet(listing.list_shards(uris, columns.videos), set(chain(*earlier)))
    }
    if len(uris) > 1:
        check_no_overlap(shards.values())
    kept = [unit for unit in earlier if all(member in shards for member in unit)]
    assigned: set[str] = set()
    units: list[list[str]] = []
    for unit in kept:
        if assigned.isdisjoint(unit):
            units.append(unit)
            assigned.update(unit)
    fresh = _grouped([shard for member, shard in shards.items() if member not in assigned], columns)
    for unit in fresh:
        storage.write_bytes(storage.join(folder, f"{content_digest(unit)}.json"), json.dumps(unit).encode())
    return sorted(
        (
            ShardGroup(digest=content_digest(unit), shards=[shards[member] for member in unit])
            for unit in [*units, *fresh]
        ),
        key=lambda unit: unit.digest,
    )


def require_unlabeled(unlabeled: list[str]) -> None:
    """Raise InvalidInputError where a run has nothing to select from; `transfer` and `measure` do without."""
    if not unlabeled:
        raise InvalidInputError("unlabeled: empty; expected the URIs of the images to select from")


def check_no_overlap(shards: Iterable[Shard]) -> None:
    """Raise InvalidInputError where a loose file is in two shards, one URI lying below another: it would be selected
    twice.

    A tar or a Parquet file that is listed twice is one shard.
    """
    seen: set[str] = set()
    for file in chain.from_iterable(shard.files for shard in shards):
        if file.uri in seen:
            raise InvalidInputError(f"unlabeled: {file.uri} lies below two of the URIs; leave one of them out")
        seen.add(file.uri)


def _load_existing_groups(folder: str) -> list[list[str]]:
    return [
        json.loads(storage.read_bytes(entry.uri))
        for entry in storage.list_objects(folder)
        if entry.uri.endswith(".json")
    ]


def _split_large_parquet(shards: list[Shard], known: set[str]) -> list[Shard]:
    """Cut Parquet files of many rows, such as lists of links; what an earlier plan kept whole is not opened again.

    Costs one look at the footer of each new file above parquet_reader.MIN_SPLIT_FILE_BYTES.
    """
    fresh = [shard for shard in shards if shard.digest() not in known]
    with ThreadPoolExecutor(READERS) as pool:
        slices = pool.map(lambda shard: _ignore_corrupt(parquet_reader.split_by_row_groups, shard), fresh)
        pieces = dict(zip((shard.digest() for shard in fresh), slices, strict=True))
    return [piece for shard in shards for piece in pieces.get(shard.digest()) or [shard]]


def _grouped(shards: list[Shard], columns: SampleFields) -> list[list[str]]:
    density = estimate_images_per_byte(shards, columns)
    for shard in shards:
        if shard.size_bytes * density > MAX_IMAGES_PER_RANKING:
            _warn_oversized(shard, columns)
    images = density * sum(shard.size_bytes for shard in shards)
    count = math.ceil(images / TARGET_IMAGES_PER_GROUP) or 1
    groups: dict[int, list[str]] = {}
    for shard in shards:
        place = int.from_bytes(hashlib.blake2b(shard.name.encode(), digest_size=8).digest(), "big") % count
        groups.setdefault(place, []).append(shard.digest())
    return [sorted(group) for group in groups.values()]


def _warn_oversized(shard: Shard, columns: SampleFields) -> None:
    """Say that a shard is too large to be ranked in bounded memory, if it looks so itself; it cannot be cut."""
    images = _ignore_corrupt(reader.estimate_sample_count, shard, columns) or 0
    if images > MAX_IMAGES_PER_RANKING:
        log_info(
            "plan",
            f"{shard.uri}: about {images:,.0f} images in one shard; one pod scores it, and takes 0.85 GB a million to "
            f"rank it; write it as several files of at most {MAX_IMAGES_PER_RANKING:,} images",
        )


def estimate_images_per_byte(shards: list[Shard], columns: SampleFields) -> float:
    """Estimate how many images the pool has in a byte, from the beginnings of a few of its shards, evenly spread.

    Raises InvalidInputError where one of them is not of the format that its name says, or lacks the image column.
    """
    images = size_bytes = 0.0
    for shard in shards[:: max(len(shards) // SAMPLED_SHARDS, 1)]:
        found = _ignore_corrupt(reader.estimate_sample_count, shard, columns)
        if found is not None:
            images += found
            size_bytes += shard.size_bytes
    return images / size_bytes if size_bytes else 0.0


def _ignore_corrupt(look: Callable[..., Found], shard: Shard, *columns: SampleFields) -> Found | None:
    """Look into a shard. A damaged one tells nothing here; the scan will name it. Raises InvalidInputError."""
    try:
        return look(shard, *columns)
    except InvalidInputError:
        raise
    except (SemiscaleError, OSError):
        return None
