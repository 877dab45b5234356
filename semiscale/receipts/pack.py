"""Define the receipt of the pack stage."""

from semiscale.receipts.base import Receipt


class PackReceipt(Receipt):
    """Receipt of D̂ as shuffled WebDataset tars.

    Attributes:
        shards: URI of a JSON list of the tars.
        tars: Number of tars.
        samples: Number of images in all tars.
        class_counts: Number of images of each class, in label order.
        size_bytes: Size of all tars.
    """

    shards: str
    tars: int
    samples: int
    class_counts: list[int]
    size_bytes: int
