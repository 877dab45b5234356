"""Define the receipt of a selection."""

from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument


class ClassSelectionStats(StrictDocument):
    """Selected images of one class of D̂.

    Attributes:
        name: Name of the class.
        wanted: Number of images requested, K.
        found: Number of images selected.
        unique: Number of these that no other class selected.
        full: Whether the class has all images requested.
        last_score: Log-odds of the last image, or None if the class has no image.
    """

    name: str
    wanted: int
    found: int
    unique: int
    full: bool
    last_score: float | None


class PoolAccounting(StrictDocument):
    """Accounting of the pool's images: listed = scored + failed + removed."""

    listed: int
    scored: int
    failed: int
    removed: int


class ExclusionStats(StrictDocument):
    """Effect of a removal list.

    Attributes:
        keys: Number of keys in the list.
        unmatched: Number of keys that match no scored image.
        examples: A few of the unmatched keys.
    """

    keys: int
    unmatched: int
    examples: list[str]

    def warning(self) -> str:
        """Return a line about unmatched keys, or "" if all keys match."""
        if not self.unmatched:
            return ""
        examples = ", ".join(map(repr, self.examples))
        return (
            f"removal list: {self.unmatched:,} of {self.keys:,} keys match no scored image, for example {examples}; "
            "the key of an image in a tar is its name up to the first dot"
        )


class RetrainDecision(StrictDocument):
    """Decision whether a grown pool has changed D̂ enough to train students again.

    Attributes:
        changed: Share of D̂ that changed since students were last trained on it, in [0, 1].
        retrain_above: Share above which students are trained again.
        kept: Whether too little changed, so that the selection is the earlier D̂.
    """

    changed: float
    retrain_above: float
    kept: bool


class SelectionReceipt(Receipt):
    """Receipt of the selection D̂.

    Attributes:
        selection: URI of a Parquet file with one row for each (image, class). It has class, rank, score, shard, index,
            key, offset and size.
        teacher: Digest of the training of the teacher.
        images: Number of rows of D̂.
        unique_images: Number of different images in D̂.
        changed_by_last_tenth: Share of D̂ that lies in the last tenth of the shards, by name. Scoring would have
            selected other images for it without these shards. It is about 0.1 if the pool is uniform, and larger if
            its end differs from the rest.
        images_per_class: K.
        classes_per_image: P.
        per_class: Counts of each class, in label order.
        ledger: Sum of all rows of `shards`.
        shards: URI of a Parquet file with one row for each shard. It has shard, listed, scored, failed and removed.
        failed: Number of failed images by reason.
        bytes_read: Bytes that the merge read.
        removal: Effect of the removal list, or None if the run has no list.
        renewal: Decision about training again, or None if the run had no earlier D̂.
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
