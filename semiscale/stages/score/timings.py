"""Add up the seconds of each part of the scan, and name its bottleneck."""

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
    """The fields of a receipt that describe the parts of the scan."""

    clocks: PartSeconds
    images: PartImageCounts
    slowest: str


def scan_stats(counts: Sequence[ShardAccounting]) -> ScanStats:
    """Add up the seconds and images of some shards, by part of the scan."""
    clocks = sum_part_seconds([count.clocks for count in counts])
    images = {part: sum(getattr(count.images, part) for count in counts) for part in PartImageCounts.model_fields}
    return {"clocks": clocks, "images": PartImageCounts(**images), "slowest": bottleneck(clocks, available_cpus())}


def sum_part_seconds(clocks: Iterable[PartSeconds]) -> PartSeconds:
    """Add up the seconds of each part of the scan."""
    totals = dict.fromkeys(PartSeconds.model_fields, 0.0)
    for part_seconds in clocks:
        for part, seconds in part_seconds.model_dump().items():
            totals[part] = round(totals[part] + seconds, 3)
    return PartSeconds(**totals)


def bottleneck(clocks: PartSeconds, threads: int) -> str:
    """Name the part of the scan that the others wait for.

    Args:
        clocks: Thread-seconds of each part. One thread reads, one forwards and one writes.
        threads: Number of threads that decode.

    Returns:
        The name of the part, or an empty string if nothing was scanned.
    """
    wall_s = {**clocks.model_dump(), "decode": clocks.decode / threads}
    return max(wall_s, key=lambda part: wall_s[part]) if any(wall_s.values()) else ""


def bottleneck_advice(clocks: PartSeconds, threads: int) -> str:
    """Name the bottleneck and the resource that relieves it, for the log.

    Args:
        clocks: Thread-seconds of each part.
        threads: Number of threads that decode.
    """
    part = bottleneck(clocks, threads)
    return f"{part}-bound: {ADVICE[part]}" if part else "nothing waited for"


def add_write_seconds(count: ShardAccounting, seconds: float) -> ShardAccounting:
    """Return the accounting of a shard with more seconds of writing.

    Args:
        count: Accounting that is copied.
        seconds: Seconds that are added.
    """
    clocks = count.clocks.model_copy(update={"write": round(count.clocks.write + seconds, 3)})
    return count.model_copy(update={"clocks": clocks})
