"""Define the receipt of the evaluation."""

from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument

Interval = tuple[float, float]


# With at most this many classes every image is among the best five.
TOP5_CLASSES = 5


def has_top5(classes: int) -> bool:
    """Return whether top-5 differs from 100% for this number of classes."""
    return classes > TOP5_CLASSES


class ModelMetrics(StrictDocument):
    """Metrics of a model on the test set.

    All intervals cover 95% (see semiscale/evaluation/metrics.py).

    Attributes:
        top1: Top-1 accuracy, in [0, 1].
        top5: Top-5 accuracy, in [0, 1].
        calibration_error: Expected calibration error, in [0, 1].
        top1_interval: Interval of `top1`.
        top5_interval: Interval of `top5`.
        calibration_error_interval: Interval of `calibration_error`.
        images: Number of test images.
        architecture: Name of the network.
        receipt: Digest of the training.
        training: URI of the receipt of the training.
        predictions: URI of a Parquet file with one row for each image.
        learning_rate: Peak learning rate of the training, for 256 images.
    """

    top1: float
    top5: float
    calibration_error: float
    top1_interval: Interval
    top5_interval: Interval
    calibration_error_interval: Interval
    images: int
    architecture: str
    receipt: str
    training: str
    predictions: str
    learning_rate: float


class PairedComparison(StrictDocument):
    """Comparison of two models on the same test images by McNemar's exact test.

    Attributes:
        model: Name of the model.
        against: Name of the model that it is compared with.
        wins: Number of images that only `model` classifies correctly.
        losses: Number of images that only `against` classifies correctly.
        difference: Top-1 of `model` minus top-1 of `against`.
        interval: Interval of `difference` that covers 95%.
        p_value: Two-sided p value.
        p_worse: One-sided p value: the probability of at most this many wins if both models are equally good.
    """

    model: str
    against: str
    wins: int
    losses: int
    difference: float
    interval: Interval
    p_value: float
    p_worse: float


class ConfusionMatrix(StrictDocument):
    """Confusion matrix.

    Attributes:
        classes: Names of the rows and columns.
        counts: Number of images by true class (row) and predicted class (column).
    """

    classes: list[str]
    counts: list[list[int]]


class SweepTrial(StrictDocument):
    """Training at one learning rate of a sweep.

    Attributes:
        learning_rate: Peak learning rate, for 256 images.
        validation_top1: Top-1 on the validation set, in [0, 1]. The trial with the highest value is chosen.
        receipt: Digest of the training.
    """

    learning_rate: float
    validation_top1: float
    receipt: str


class EvaluationReceipt(Receipt):
    """Receipt of the evaluation of the four models on the same test images.

    Attributes:
        models: Metrics by model: `teacher`, `baseline`, `pretrained` and `student`.
        per_class: Top-1 of each class by model, in label order.
        per_class_intervals: Intervals of `per_class`.
        chosen: Learning rate of the evaluated `baseline` and `student`.
        tried: All trials of `baseline` and `student`.
        comparisons: Comparisons of the student with each other model.
        confusion: Confusion matrix of the student.
    """

    models: dict[str, ModelMetrics]
    per_class: dict[str, list[float]]
    per_class_intervals: dict[str, list[Interval]]
    chosen: dict[str, float]
    tried: dict[str, list[SweepTrial]]
    comparisons: list[PairedComparison]
    confusion: ConfusionMatrix


class ModelEvaluation(StrictDocument):
    """Evaluation of one model on a test set.

    Attributes:
        model: Metrics of the model.
        classes: Names of the classes, in label order.
        per_class: Top-1 of each class.
        per_class_intervals: Intervals of `per_class`.
        confusion: Confusion matrix of the model.
    """

    model: ModelMetrics
    classes: list[str]
    per_class: list[float]
    per_class_intervals: list[Interval]
    confusion: ConfusionMatrix
