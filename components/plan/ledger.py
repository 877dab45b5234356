"""The ledger of the unlabeled pool: its shards, grouped into units that are scored and committed as one.

Which unit a shard falls into is decided by a hash of its name, so that no unit collects one kind of image. A unit, once
formed, is kept as long as its shards are unchanged: a pool that grows adds units and leaves the finished ones alone.
"""

import hashlib
import json

from components.shared import shards as sharding
from components.shared import storage
from components.shared.errors import Refused
from components.shared.shards import Shard, Unit
from components.shared.stage import digest

UNIT_BYTES = 64 << 30  # about a million images at 64 kB: a billion images make a thousand units
MIN_UNITS = 64  # so that a small pool still spreads over pods


def draw_up(uris: list[str], workdir: str) -> list[Unit]:
    """List the pool and group it into units, in order of their digests. Raises Refused where a URI holds nothing.

    Memory: about 1 kB a shard, 100 MB for a billion images in shards of 10,000.
    """
    shards = {shard.digest(): shard for shard in sharding.find(uris)}
    refuse_equal_names(list(shards.values()))
    folder = storage.join(workdir, "stages", "plan", "units")
    kept = [unit for unit in _kept_units(folder) if all(member in shards for member in unit)]
    assigned: set[str] = set()
    units: list[list[str]] = []
    for unit in kept:
        if assigned.isdisjoint(unit):
            units.append(unit)
            assigned.update(unit)
    fresh = _grouped([shard for member, shard in shards.items() if member not in assigned])
    for unit in fresh:
        storage.write(storage.join(folder, f"{digest(unit)}.json"), json.dumps(unit).encode())
    return sorted(
        (Unit(digest=digest(unit), shards=[shards[member] for member in unit]) for unit in [*units, *fresh]),
        key=lambda unit: unit.digest,
    )


def refuse_equal_names(shards: list[Shard]) -> None:
    """Raise Refused where two shards have one name: samples could not be told apart."""
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.name in seen:
            raise Refused(
                f"unlabeled: {seen[shard.name]} and {shard.uri} are both called {shard.name!r}; "
                "list their common folder instead"
            )
        seen[shard.name] = shard.uri


def _kept_units(folder: str) -> list[list[str]]:
    return [json.loads(storage.read(entry.uri)) for entry in storage.entries(folder) if entry.uri.endswith(".json")]


def _grouped(shards: list[Shard]) -> list[list[str]]:
    size = sum(shard.size_bytes for shard in shards)
    count = max(-(-size // UNIT_BYTES), min(MIN_UNITS, len(shards)), 1)
    groups: dict[int, list[str]] = {}
    for shard in shards:
        place = int.from_bytes(hashlib.blake2b(shard.name.encode(), digest_size=8).digest(), "big") % count
        groups.setdefault(place, []).append(shard.digest())
    return [sorted(group) for group in groups.values()]
