"""The inputs of an evaluation."""

from typing import ClassVar

from semiscale.common.digest import content_digest
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.stage_config import ReceiptUri, ReceiptUris, StageConfig
from semiscale.storage.documents import load_document

RESULT_VERSION = (
    2  # to be raised with the receipt's fields, so that an older receipt is not taken for one with all of them
)


class EvaluateConfig(StageConfig):
    """The models to measure. Of several baselines or students, the best on validation is measured, and it alone."""

    stage: ClassVar[str] = "evaluate"
    on_device: ClassVar[bool] = True

    plan: ReceiptUri
    """The plan's receipt: it names the test split."""
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
        """Beyond the models, the result depends on the test split, and on what is measured."""
        return content_digest(super().digest(), load_document(self.plan, PlanReceipt).test.digest, RESULT_VERSION)
