"""The clocks of a scan added up: what its parts took and did, and which of them the others waited for."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from semiscale.common.cpu import available_cpus
from semiscale.receipts.score import PartImageCounts, PartSeconds, ShardAccounting

ADVICE = {
    "read": "add pods, or use a store nearer by",
    "decode": "add CPUs",
    "forward": "use a faster device, or add pods",
    "write": "add pods, or use a store nearer by",
}


class ScanStats(TypedDict):
    """What receipts say of a scan's parts."""

    clocks: PartSeconds
    images: PartImageCounts
    slowest: str


def scan_stats(counts: Sequence[ShardAccounting]) -> ScanStats:
    """Add up what the parts of the scan took and did."""
    clocks = sum_part_seconds([count.clocks for count in counts])
    images = {part: sum(getattr(count.images, part) for count in counts) for part in PartImageCounts.model_fields}
    return {"clocks": clocks, "images": PartImageCounts(**images), "slowest": bottleneck(clocks, available_cpus())}


def sum_part_seconds(clocks: Iterable[PartSeconds]) -> PartSeconds:
    """Add up clocks."""
    spent = dict.fromkeys(PartSeconds.model_fields, 0.0)
    for one in clocks:
        for part, seconds in one.model_dump().items():
            spent[part] = round(spent[part] + seconds, 3)
    return PartSeconds(**spent)


def bottleneck(clocks: PartSeconds, threads: int) -> str:
    """Name the part that a scan waits for: one thread reads, one forwards and one writes, `threads` decode."""
    wall = {**clocks.model_dump(), "decode": clocks.decode / threads}
    return max(wall, key=lambda part: wall[part]) if any(wall.values()) else ""


def bottleneck_advice(clocks: PartSeconds, threads: int) -> str:
    """Name what a scan waits for, and what to buy more of."""
    part = bottleneck(clocks, threads)
    return f"{part}-bound: {ADVICE[part]}" if part else "nothing waited for"


def add_write_seconds(count: ShardAccounting, seconds: float) -> ShardAccounting:
    """Return a shard's line with more seconds of writing."""
    clocks = count.clocks.model_copy(update={"write": round(count.clocks.write + seconds, 3)})
    return count.model_copy(update={"clocks": clocks})
