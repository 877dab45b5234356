"""Define the receipt of the plan."""

from semiscale.data.labeled import LabeledSplit
from semiscale.receipts.base import BadSample, Receipt


class PlanReceipt(Receipt):
    """The inputs, listed and checked. `units` is a JSON list of the ledger's units (see shards.Unit).

    `digest` identifies what models are trained on: the classes, the training and the validation split. The unlabeled
    pool has a digest of its own, so that a pool that grows does not retrain the teacher.
    """

    name: str
    pool_digest: str
    classes: list[str]
    train: LabeledSplit
    validation: LabeledSplit
    test: LabeledSplit
    units: str
    shards: int
    size_bytes: int
    pods: int
    classes_per_image: int
    failed: dict[str, int]
    failures: list[BadSample]
    notes: list[str]
    run: dict[str, object]

    @property
    def is_video(self) -> bool:
        """Say whether the samples are videos."""
        return bool(self.run.get("frames"))
