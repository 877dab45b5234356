"""Define the inputs of an evaluation."""

from typing import ClassVar

from semiscale.common.digest import content_digest
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.stage_config import ReceiptUri, ReceiptUris, StageConfig
from semiscale.storage.documents import load_document

# Raise this number when fields are added to the receipt. Older receipts, which lack them, are then not reused.
RESULT_VERSION = 2


class EvaluateConfig(StageConfig):
    """Models to evaluate.

    Only the best baseline and the best student on the validation set are evaluated.
    """

    stage: ClassVar[str] = "evaluate"
    on_device: ClassVar[bool] = True

    plan: ReceiptUri
    """The plan's receipt, which names the test split."""
    teacher: ReceiptUri
    """The teacher's receipt."""
    baselines: ReceiptUris
    """The receipts of the baseline at every learning rate."""
    pretrained: ReceiptUri
    """The receipt of the student before fine-tuning."""
    students: ReceiptUris
    """The receipts of the fine-tuned student at every learning rate."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""

    def digest(self) -> str:
        """Return the digest of the config, the test split and the version of the result."""
        return content_digest(super().digest(), load_document(self.plan, PlanReceipt).test.digest, RESULT_VERSION)
