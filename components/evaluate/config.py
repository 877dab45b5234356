"""The inputs of an evaluation."""

from typing import ClassVar

from components.shared.receipts import PlanReceipt, load
from components.shared.stage import ReceiptUri, ReceiptUris, StageConfig, digest


class EvaluateConfig(StageConfig):
    """The models to measure. Of several baselines or students, the best on validation is measured, and it alone."""

    stage: ClassVar[str] = "evaluate"

    plan: ReceiptUri
    teacher: ReceiptUri
    baselines: ReceiptUris
    pretrained: ReceiptUri
    students: ReceiptUris
    image_column: str = "image"
    label_column: str = "label"

    def digest(self) -> str:
        """Beyond the models, the result depends on the test split."""
        return digest(super().digest(), load(self.plan, PlanReceipt).test.digest)
