"""Receipts: the small JSON documents that stages hand to each other.

A receipt names what a stage left in the workdir, counts it, and says what was skipped and why. It is written last: what
has a receipt is whole. `digest` identifies the work by its inputs, so equal work is found instead of repeated.
"""

from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import PairedComparison


class PromotionReceipt(Receipt):
    """Whether the student became the champion, and why. `champion` is the URI of the object that names the champion.

    `comparison` is None where there was nothing to compare: the student is the champion, or the classes differ.
    """

    champion: str
    model: str
    promoted: bool
    why: str
    comparison: PairedComparison | None
