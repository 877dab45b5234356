"""Define the receipt of a training."""

from pydantic import Field

from semiscale.data.preprocessing import Preprocessing
from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument


class CurvePoint(StrictDocument):
    """One point of a learning curve; `images_processed` counts forward and backward passes (the paper's #iter)."""

    images_processed: int
    learning_rate: float
    loss: float
    validation_top1: float | None = None


class RegularizationTrial(StrictDocument):
    """One L2 of a logistic regression, for features of length 1, and what it was chosen or left by: validation.

    `gradient` is what was left of it after so many steps, against that of no weights; see logistic_regression.py.
    """

    l2: float
    validation_top1: float
    validation_loss: float
    steps: int
    gradient: float


class TrainReceipt(Receipt):
    """A trained model. `learning_rate` is the peak, for 256 images, as in the paper's notation.

    `source` names the weights it started from, "" where those were fresh; of a ready-made teacher, which has processed
    no images, the checkpoint that it is. Where only the head was fitted (fc-only) no images are processed either, and
    there is no learning rate: `fitted` lists every `l2` that was tried, and `l2` is the one that was chosen.
    """

    recipe: str
    architecture: str
    checkpoint: str
    source: str = ""
    parameters: int
    classes: list[str]
    preprocessing: Preprocessing
    images_processed: int
    samples: int
    learning_rate: float
    validation_top1: float
    curve: list[CurvePoint]
    images_per_s: float
    l2: float = 0.0
    fitted: list[RegularizationTrial] = Field(default=[])

    @property
    def model_label(self) -> str:
        """The architecture, and how long the clips are that it sees, where it sees clips."""
        frames = self.preprocessing.frames
        return f"{self.architecture}, {frames} frames" if frames else self.architecture
