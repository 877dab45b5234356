"""List the unlabeled pool and divide its shards into shard groups.

The scores of a shard group are ranked and merged together. A hash of its name decides the group of a shard, so that no
group collects one kind of image. A group is kept as long as its shards are unchanged. A pool that grows adds groups and
leaves the finished ones as they are.

The digest of a group covers the URIs and versions of its shards. The order of its shards does not depend on them. The
pool is therefore scanned, and its samples are numbered, alike in every store.
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

# The merge reads about K / groups ranks of each class from each group, plus a margin for chance. Fewer groups have a
# smaller margin. With the paper's K / pool, and a pool ten times as large, 8 million images leave K / groups above 12.
# There, the merge reads less than three times the images that win. With a larger group, compaction would cost a pod
# too much memory. A group that turns out to have many more images is compacted in pieces.
TARGET_IMAGES_PER_GROUP = 8_000_000
# Shards that are opened to estimate the size of an image.
SAMPLED_SHARDS = 8
# Parquet footers that are read at once. They hide the latency of an object store.
MAX_CONCURRENT_FOOTER_READS = 32

T = TypeVar("T")


def build_shard_groups(uris: list[str], workdir: str, columns: SampleFields) -> list[ShardGroup]:
    """List the pool and divide it into shard groups.

    Args:
        uris: URIs of the pool.
        workdir: URI of the workdir, which keeps the groups of earlier plans.
        columns: Column of the images in Parquet files, and whether the samples are videos.

    Returns:
        The groups in order of their digests. The shards of a group are in the order of a hash of their names.

    Raises:
        InvalidInputError: If a URI holds no samples, or two URIs hold the same loose file.

    Cost:
        Memory is about 1 kB a tar or Parquet file: 100 MB for a billion images in shards of 10,000. It is 700 bytes a
        loose file: 700 GB for a billion. Pack loose files into tars from some tens of millions on.
    """
    # List the shards. Parquet files that an earlier plan kept whole stay whole.
    folder = storage.join(workdir, "stages", "plan", "units")
    earlier_groups = _load_existing_groups(folder)
    listed = listing.list_shards(uris, columns.videos)
    shards = {shard.digest(): shard for shard in _split_large_parquet(listed, set(chain(*earlier_groups)))}
    if len(uris) > 1:
        check_no_overlap(shards.values())

    # Keep the earlier groups whose shards are all in the pool.
    assigned: set[str] = set()
    kept_groups: list[list[str]] = []
    for group in earlier_groups:
        if all(digest in shards for digest in group) and assigned.isdisjoint(group):
            kept_groups.append(group)
            assigned.update(group)

    # Group the other shards, and store the new groups for later plans.
    new_groups = _group_by_hash([shard for digest, shard in shards.items() if digest not in assigned], columns)
    for group in new_groups:
        storage.write_bytes(storage.join(folder, f"{content_digest(group)}.json"), json.dumps(group).encode())
    shard_groups = [
        ShardGroup(
            digest=content_digest(group), shards=sorted((shards[digest] for digest in group), key=_hash_shard_name)
        )
        for group in [*kept_groups, *new_groups]
    ]
    return sorted(shard_groups, key=lambda group: group.digest)


def require_unlabeled(unlabeled: list[str]) -> None:
    """Check that a run has images to select from. `transfer` and `measure` need none.

    Args:
        unlabeled: URIs of the pool.

    Raises:
        InvalidInputError: If the list is empty.
    """
    if not unlabeled:
        raise InvalidInputError("SEMI-E200", "unlabeled: the list is empty. Give the URIs of the images.")


def check_no_overlap(shards: Iterable[Shard]) -> None:
    """Check that no loose file is in two shards, for it would be selected twice.

    This happens if one URI lies below another. A tar or a Parquet file that is listed twice is one shard.

    Args:
        shards: The shards of the pool.

    Raises:
        InvalidInputError: If a loose file is in two shards.
    """
    seen: set[str] = set()
    for file in chain.from_iterable(shard.files for shard in shards):
        if file.uri in seen:
            raise InvalidInputError(
                "SEMI-E201", f"unlabeled: {file.uri} lies below two of the URIs. Leave one of them out."
            )
        seen.add(file.uri)


def estimate_images_per_byte(shards: list[Shard], columns: SampleFields) -> float:
    """Estimate the images in a byte of the pool from the beginnings of a few shards.

    Args:
        shards: The shards. `SAMPLED_SHARDS` to twice as many of them, evenly spaced, are opened.
        columns: Column of the images in Parquet files.

    Returns:
        Images per byte, 0 if no shard can be read.

    Raises:
        InvalidInputError: If a shard's format differs from its name, or it lacks the image column.
    """
    images = size_bytes = 0.0
    for shard in shards[:: max(len(shards) // SAMPLED_SHARDS, 1)]:
        sample_count = _ignore_corrupt(reader.estimate_sample_count, shard, columns)
        if sample_count is not None:
            images += sample_count
            size_bytes += shard.size_bytes
    return images / size_bytes if size_bytes else 0.0


def _load_existing_groups(folder: str) -> list[list[str]]:
    """Return the groups of earlier plans, each as the digests of its shards."""
    return [
        json.loads(storage.read_bytes(entry.uri))
        for entry in storage.list_objects(folder)
        if entry.uri.endswith(".json")
    ]


def _split_large_parquet(shards: list[Shard], known: set[str]) -> list[Shard]:
    """Split Parquet files of many rows, such as lists of links.

    Shards in `known` are digests of an earlier plan, and are not opened again.

    Cost:
        One read of the footer of each new file above parquet_reader.MIN_SPLIT_FILE_BYTES.
    """
    new_shards = [shard for shard in shards if shard.digest() not in known]
    with ThreadPoolExecutor(MAX_CONCURRENT_FOOTER_READS) as pool:
        splits = pool.map(lambda shard: _ignore_corrupt(parquet_reader.split_by_row_groups, shard), new_shards)
        parts_of_shard = dict(zip((shard.digest() for shard in new_shards), splits, strict=True))
    return [part for shard in shards for part in parts_of_shard.get(shard.digest()) or [shard]]


def _group_by_hash(shards: list[Shard], columns: SampleFields) -> list[list[str]]:
    """Return the digests of the shards, in groups of about TARGET_IMAGES_PER_GROUP images."""
    images_per_byte = estimate_images_per_byte(shards, columns)
    for shard in shards:
        if shard.size_bytes * images_per_byte > MAX_IMAGES_PER_RANKING:
            _warn_oversized(shard, columns)
    images = images_per_byte * sum(shard.size_bytes for shard in shards)
    count = math.ceil(images / TARGET_IMAGES_PER_GROUP) or 1
    groups: dict[int, list[str]] = {}
    for shard in shards:
        groups.setdefault(_hash_shard_name(shard) % count, []).append(shard.digest())
    return [sorted(group) for group in groups.values()]


def _hash_shard_name(shard: Shard) -> int:
    return int.from_bytes(hashlib.blake2b(shard.name.encode(), digest_size=8).digest(), "big")


def _warn_oversized(shard: Shard, columns: SampleFields) -> None:
    """Log a shard that is too large to be ranked in bounded memory. It cannot be split."""
    images = _ignore_corrupt(reader.estimate_sample_count, shard, columns) or 0
    if images > MAX_IMAGES_PER_RANKING:
        log_info(
            "plan",
            f"{shard.uri}: the shard has about {images:,.0f} images. One pod scores it, and needs 0.85 GB of memory a "
            f"million images to rank it. Write it as several files of at most {MAX_IMAGES_PER_RANKING:,} images.",
        )


def _ignore_corrupt(read: Callable[..., T], shard: Shard, *columns: SampleFields) -> T | None:
    """Read from a shard, and return None if it is damaged. Scoring will report it.

    Raises:
        InvalidInputError: If the shard is refused for another reason.
    """
    try:
        return read(shard, *columns)
    except InvalidInputError:
        raise
    except (SemiscaleError, OSError):
        return None
