"""Define the receipt of the packing."""

from semiscale.receipts.base import Receipt


class PackReceipt(Receipt):
    """D̂ copied into shuffled WebDataset tars, listed in `shards` (JSON)."""

    shards: str
    tars: int
    samples: int
    class_counts: list[int]
    size_bytes: int
