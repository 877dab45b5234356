"""Define the receipt of a selection."""

from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument


class ClassSelectionStats(StrictDocument):
    """One class of D̂: how many images were wanted and found, and the log-odds of the last one.

    `unique` of them were selected for no other class.
    """

    name: str
    wanted: int
    found: int
    unique: int
    full: bool
    last_score: float | None


class PoolAccounting(StrictDocument):
    """The scan's balance: listed = scored + failed + removed."""

    listed: int
    scored: int
    failed: int
    removed: int


class ExclusionStats(StrictDocument):
    """A removal list: how many keys it has, how many of them match no scored image, and a few of those."""

    keys: int
    unmatched: int
    examples: list[str]

    def warning(self) -> str:
        """Say what matches nothing, in one line; nothing where all keys match."""
        if not self.unmatched:
            return ""
        examples = ", ".join(map(repr, self.examples))
        return (
            f"removal list: {self.unmatched:,} of {self.keys:,} keys match no scored image, for example {examples}; "
            "the key of an image in a tar is its name up to the first dot"
        )


class RetrainDecision(StrictDocument):
    """The share of D̂ that changed since it was last trained on. `kept`: too little, and this is the earlier D̂."""

    changed: float
    retrain_above: float
    kept: bool


class SelectionReceipt(Receipt):
    """D̂: a Parquet file with one row an (image, class): class, rank, score, shard, index, key, offset, size.

    `changed_by_last_tenth` is the share of D̂ that would be other images had the scan stopped before the last tenth of
    the shards, by name: about 0.1 where the pool is the same throughout, more where its end is unlike the rest.
    `ledger` adds up `shards`, a Parquet file with one line a shard: shard, listed, scored, failed, removed.
    `removal` says what the removal list came to, where there is one.
    `renewal` says how it came to be trained on, where the run had another D̂ before.
    """

    selection: str
    teacher: str
    images: int
    unique_images: int
    changed_by_last_tenth: float
    images_per_class: int
    classes_per_image: int
    per_class: list[ClassSelectionStats]
    ledger: PoolAccounting
    shards: str = ""
    failed: dict[str, int]
    bytes_read: int
    removal: ExclusionStats | None = None
    renewal: RetrainDecision | None = None
