"""Define the receipt of the stage that counts pods."""

from semiscale.receipts.base import Receipt


class FanoutReceipt(Receipt):
    """Receipt of a fan-out. `folder` is the folder that its pods will write to.

    Attributes:
        pods: Number of pods that the remaining work needs.
        why: Reason of this number, for people.
    """

    pods: int
    why: str
