"""Receipts: the small JSON documents that stages hand to each other.

A receipt names what a stage left in the workdir, counts it, and says what was skipped and why. It is written last: what
has a receipt is whole. `digest` identifies the work by its inputs, so equal work is found instead of repeated.
"""

from semiscale.storage.documents import Digest, StrictDocument


class Receipt(StrictDocument):
    """What every stage leaves: which work this was, where it lies, how long it took."""

    stage: str
    digest: Digest
    folder: str
    seconds: float


class BadSample(StrictDocument):
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str
