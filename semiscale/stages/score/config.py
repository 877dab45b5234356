"""Define the inputs of a scoring pod and of the choice of the number of pods."""

from typing import ClassVar

from semiscale.config.run_parameters import Decoder
from semiscale.runtime.stage_config import ReceiptUri, StageConfig


class ScoreFanoutConfig(StageConfig):
    """Inputs of the step that counts unscored shards and chooses the number of pods."""

    stage: ClassVar[str] = "count"

    plan: ReceiptUri
    """The plan's receipt. It names the list of shard groups."""
    teacher: ReceiptUri
    """The teacher's receipt."""
    image_column: str = "image"
    """Parquet column of the images. Each column has a score folder of its own."""
    decoder: Decoder = "cpu"
    """Decoder of plain JPEGs. Each decoder has a score folder of its own, because pixels differ slightly."""

    def task_name(self) -> str:
        """Return the name of the task's folder."""
        return "count-unscored"


class ScoreConfig(ScoreFanoutConfig):
    """Inputs of one scoring pod."""

    stage: ClassVar[str] = "score"
    on_device: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True

    count: ReceiptUri = ""
    """Receipt that holds the number of pods. If it is empty, the plan's maximum is used."""
    pod: int
    """Number of this pod, from 0."""
    images_per_class: int
    """K, which sets the size of the first band of a score file. Any other K can be selected later."""

    def task_name(self) -> str:
        """Return the name of the task's folder, which contains the pod's number."""
        return f"score-{self.pod}"
