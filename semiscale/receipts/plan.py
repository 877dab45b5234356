"""Define the receipt of the plan."""

from semiscale.data.labeled import LabeledSplit
from semiscale.receipts.base import BadSample, Receipt


class PlanReceipt(Receipt):
    """Receipt of the listed and checked inputs.

    `digest` identifies the classes, the training split and the validation split. The unlabeled pool has its own digest,
    so that the teacher is not trained again when the pool grows.

    Attributes:
        name: Name of the run.
        pool_digest: Digest of the unlabeled pool.
        classes: Names of the classes, in label order.
        train: Training split of the labeled set.
        validation: Validation split.
        test: Test split.
        units: URI of a JSON list of the shard groups (see semiscale.data.shard.ShardGroup).
        shards: Number of shards of the pool.
        size_bytes: Size of the pool.
        pods: Largest number of scoring pods.
        classes_per_image: P.
        failed: Number of unusable labeled samples by reason.
        failures: Some of these samples.
        notes: Remarks for people, for example about values that were adjusted.
        run: Content of the run file.
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
        """Whether the samples are videos."""
        return bool(self.run.get("frames"))
