"""Define the receipt of a training."""

from pydantic import Field

from semiscale.data.preprocessing import Preprocessing
from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument


class CurvePoint(StrictDocument):
    """Point of a learning curve.

    Attributes:
        images_processed: Images that passed forward and backward, the paper's #iter.
        learning_rate: Learning rate of the minibatch.
        loss: Training loss.
        validation_top1: Top-1 on the validation set in [0, 1], or None if it was not measured here.
    """

    images_processed: int
    learning_rate: float
    loss: float
    validation_top1: float | None = None


class RegularizationTrial(StrictDocument):
    """Fit of a logistic regression at one L2 strength, for features of length 1.

    Attributes:
        l2: Strength of the L2 regularization.
        validation_top1: Top-1 on the validation set, in [0, 1].
        validation_loss: Loss on the validation set.
        steps: Number of steps of the solver.
        gradient: Gradient after the last step, relative to that of zero weights (see
            semiscale/stages/train/logistic_regression.py).
    """

    l2: float
    validation_top1: float
    validation_loss: float
    steps: int
    gradient: float


class TrainReceipt(Receipt):
    """Receipt of a trained model.

    A ready-made teacher has processed no images. A linear probe (`fc-only`) has processed no images either and has no
    learning rate.

    Attributes:
        recipe: Name of the recipe.
        architecture: Name of the network.
        checkpoint: URI of the trained weights.
        source: URI of the start weights, or "" if they were random. It is the checkpoint of a ready-made teacher.
        parameters: Number of parameters.
        classes: Names of the classes, in label order.
        preprocessing: Preprocessing of the samples.
        images_processed: Images that passed forward and backward, the paper's #iter.
        samples: Number of different training samples.
        learning_rate: Peak learning rate for 256 images, as in the paper.
        validation_top1: Top-1 on the validation set, in [0, 1].
        curve: Learning curve.
        images_per_s: Training speed.
        l2: L2 strength that a linear probe chose.
        fitted: All L2 strengths that a linear probe tried.
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
        """Architecture, with the length of the clips if the samples are clips."""
        frames = self.preprocessing.frames
        return f"{self.architecture}, {frames} frames" if frames else self.architecture
