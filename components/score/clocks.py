"""The clocks of a scan added up: what its parts took and did, and which of them the others waited for."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from components.shared.cores import cores
from components.shared.receipts import Clocks, Images, ShardCount

ADVICE = {
    "read": "add pods, or use a store nearer by",
    "decode": "add CPUs",
    "forward": "use a faster device, or add pods",
    "write": "add pods, or use a store nearer by",
}


class Worked(TypedDict):
    """What receipts say of a scan's parts."""

    clocks: Clocks
    images: Images
    slowest: str


def worked(counts: Sequence[ShardCount]) -> Worked:
    """Add up what the parts of the scan took and did."""
    clocks = total([count.clocks for count in counts])
    images = {part: sum(getattr(count.images, part) for count in counts) for part in Images.model_fields}
    return {"clocks": clocks, "images": Images(**images), "slowest": slowest(clocks, cores())}


def total(clocks: Iterable[Clocks]) -> Clocks:
    """Add up clocks."""
    spent = dict.fromkeys(Clocks.model_fields, 0.0)
    for one in clocks:
        for part, seconds in one.model_dump().items():
            spent[part] = round(spent[part] + seconds, 3)
    return Clocks(**spent)


def slowest(clocks: Clocks, threads: int) -> str:
    """Name the part that a scan waits for: one thread reads, one forwards and one writes, `threads` decode."""
    wall = {**clocks.model_dump(), "decode": clocks.decode / threads}
    return max(wall, key=lambda part: wall[part]) if any(wall.values()) else ""


def bound(clocks: Clocks, threads: int) -> str:
    """Name what a scan waits for, and what to buy more of."""
    part = slowest(clocks, threads)
    return f"{part}-bound: {ADVICE[part]}" if part else "nothing waited for"


def with_write(count: ShardCount, seconds: float) -> ShardCount:
    """Return a shard's line with more seconds of writing."""
    clocks = count.clocks.model_copy(update={"write": round(count.clocks.write + seconds, 3)})
    return count.model_copy(update={"clocks": clocks})
