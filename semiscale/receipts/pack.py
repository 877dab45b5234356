"""Receipts: the small JSON documents that stages hand to each other.

A receipt names what a stage left in the workdir, counts it, and says what was skipped and why. It is written last: what
has a receipt is whole. `digest` identifies the work by its inputs, so equal work is found instead of repeated.
"""

from semiscale.receipts.base import Receipt


class PackReceipt(Receipt):
    """D̂ copied into shuffled WebDataset tars, listed in `shards` (JSON)."""

    shards: str
    tars: int
    samples: int
    class_counts: list[int]
    size_bytes: int
