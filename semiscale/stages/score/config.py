"""The inputs of one pod's scan, and of the count of what there is to scan."""

from typing import ClassVar

from semiscale.config.run_parameters import Decoder
from semiscale.runtime.stage_config import ReceiptUri, StageConfig


class ScoreFanoutConfig(StageConfig):
    """What the scan would find, before there are pods for it."""

    stage: ClassVar[str] = "count"

    plan: ReceiptUri
    """The plan's receipt: it names the ledger of the pool."""
    teacher: ReceiptUri
    """The teacher's receipt."""
    image_column: str = "image"
    """Parquet column of the images; the scores of each are kept apart."""
    decoder: Decoder = "cpu"
    """What decodes plain JPEGs; the scores of each are kept apart, because their pixels differ slightly."""

    def task_name(self) -> str:
        """What is counted."""
        return "count-unscored"


class ScoreConfig(ScoreFanoutConfig):
    """One pod's share of the scan."""

    stage: ClassVar[str] = "score"
    on_device: ClassVar[bool] = True

    count: ReceiptUri = ""
    """The receipt of the count of what is left: how many pods there are. Without: as many as the plan has at most."""
    pod: int
    """Which of the pods this is, from 0."""
    images_per_class: int
    """K: how the score files are laid out; any other K can still be selected."""

    def task_name(self) -> str:
        """The pod's number."""
        return f"score-{self.pod}"
