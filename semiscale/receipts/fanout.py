"""Define the receipt of a count of pods."""

from semiscale.receipts.base import Receipt


class FanoutReceipt(Receipt):
    """How many pods a fan-out has, by what is left to do, and what that is. `folder` is where the pods will work."""

    pods: int
    why: str
