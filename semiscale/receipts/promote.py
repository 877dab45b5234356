"""Define the receipt of a promotion."""

from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import PairedComparison


class PromotionReceipt(Receipt):
    """Receipt of the decision about the champion.

    Attributes:
        champion: URI of the object that names the champion.
        model: Digest of the training of the student.
        promoted: Whether the student became the champion.
        why: Reason of the decision, for people.
        comparison: Comparison with the champion, or with the baseline if there is no champion. It is None if the
            student is already the champion or the classes differ.
    """

    champion: str
    model: str
    promoted: bool
    why: str
    comparison: PairedComparison | None
