"""Define the receipt of a promotion."""

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
