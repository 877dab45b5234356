"""Define the receipts of the scoring."""

from pydantic import Field

from semiscale.common.errors import SemiscaleError
from semiscale.receipts.base import BadSample, Receipt
from semiscale.storage.documents import StrictDocument


class PartSeconds(StrictDocument):
    """Where the scan's time went, in thread-seconds. Many threads decode: what to buy more of is a receipt's `slowest`.

    `write` is encoding, and the share of putting the unit's files together. The upload of a shard's own part is not in
    it: the part holds these clocks, and is whole before it is sent. The log's lines count it.
    """

    read: float = 0.0
    decode: float = 0.0
    forward: float = 0.0
    write: float = 0.0


class PartImageCounts(StrictDocument):
    """How many images each part of the scan worked on: what has no bytes is not decoded, what is damaged not forwarded,
    what has scores that are not finite not written.
    """

    read: int = 0
    decode: int = 0
    forward: int = 0
    write: int = 0


class ShardAccounting(StrictDocument):
    """One shard's line in the ledger: listed = scored + failed.

    `listed` is counted where the shard is read, and the others where scores are written, so that a sample that was lost
    in between is a hole.
    """

    shard: str
    digest: str
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: PartSeconds = PartSeconds()
    images: PartImageCounts = PartImageCounts()

    def check_complete(self) -> None:
        """Raise SemiscaleError where the line does not add up."""
        if self.listed != self.scored + sum(self.failed.values()):
            raise SemiscaleError(
                "SEMI-E179",
                f"shard {self.shard}: {self.listed} samples were listed, but {self.scored} scored and "
                f"{sum(self.failed.values())} failed. Score the shard again.",
            )


class ShardGroupReceipt(Receipt):
    """The scores of one unit: Parquet files (see semiscale/scores/score_file.py and places.py).

    A unit that turned out to have more images than can be ranked at once has `pieces` instead of files: each has some
    of its shards and files of its own, as if it were a unit. What is counted here is their sum.

    `slowest` is the part of the scan that the others waited for, "" where nothing was scanned.
    """

    teacher: str
    pod: int
    scores: str
    places: str
    samples: str
    shards: list[ShardAccounting]
    failures: list[BadSample]
    clocks: PartSeconds
    images: PartImageCounts = PartImageCounts()
    slowest: str = ""
    pieces: list["ShardGroupReceipt"] = Field(default=[])

    @property
    def scored(self) -> int:
        """How many images have scores."""
        return sum(shard.scored for shard in self.shards)


class ScoreReceipt(Receipt):
    """What one pod did: units it scored, units it found finished, its clocks, and the slowest part of its scan."""

    pod: int
    teacher: str
    units: int
    units_found: int
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: PartSeconds
    images: PartImageCounts = PartImageCounts()
    slowest: str = ""
