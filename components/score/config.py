"""The inputs of one pod's scan."""

from typing import ClassVar

from components.shared.runfile import Decoder
from components.shared.stage import ReceiptUri, StageConfig


class ScoreConfig(StageConfig):
    """One pod's share of the scan."""

    stage: ClassVar[str] = "score"
    on_device: ClassVar[bool] = True

    plan: ReceiptUri
    """The plan's receipt: it names the ledger of the pool."""
    teacher: ReceiptUri
    """The teacher's receipt."""
    pod: int
    """Which of the pods this is, from 0."""
    images_per_class: int
    """K: how the score files are laid out; any other K can still be selected."""
    image_column: str = "image"
    """Parquet column of the images."""
    decoder: Decoder = "cpu"
    """What decodes plain JPEGs; the scores of each are kept apart, because their pixels differ slightly."""

    def task(self) -> str:
        """The pod's number."""
        return f"score-{self.pod}"
