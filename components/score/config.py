"""The inputs of one pod's scan."""

from typing import ClassVar

from components.shared.stage import ReceiptUri, StageConfig


class ScoreConfig(StageConfig):
    """One pod's share of the scan."""

    stage: ClassVar[str] = "score"

    plan: ReceiptUri
    teacher: ReceiptUri
    pod: int
    images_per_class: int
    image_column: str = "image"
