"""Define the receipt of the evaluation."""

from semiscale.receipts.base import Receipt
from semiscale.storage.documents import StrictDocument

Interval = tuple[float, float]


class ModelMetrics(StrictDocument):
    """A model on the test set. Fractions in [0, 1]; intervals cover 95% (see measures.py).

    `receipt` is the training's digest, `training` the URI of its receipt, `predictions` that of a Parquet file with one
    row an image.
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
    """Two models on the same images: `wins` counts those that only `model` gets right, `losses` only `against`.

    `p_value` is McNemar's, exact, two-sided; `p_worse` is the chance of so few wins were the two equally good.
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
    """How many images of a class (row) were given which class (column)."""

    classes: list[str]
    counts: list[list[int]]


class SweepTrial(StrictDocument):
    """One learning rate of a sweep, and what it was chosen or left by: the validation top-1."""

    learning_rate: float
    validation_top1: float
    receipt: str


class EvaluationReceipt(Receipt):
    """The four models on the same test images: accuracies, top-1 by class, the student against the others.

    `tried` lists every learning rate of baseline and student, `chosen` those that were measured; `confusion` is the
    student's.
    """

    models: dict[str, ModelMetrics]
    per_class: dict[str, list[float]]
    per_class_intervals: dict[str, list[Interval]]
    chosen: dict[str, float]
    tried: dict[str, list[SweepTrial]]
    comparisons: list[PairedComparison]
    confusion: ConfusionMatrix


class ModelEvaluation(StrictDocument):
    """One model on a test set, as the evaluation measures four: accuracies, top-1 by class, what was taken for what."""

    model: ModelMetrics
    classes: list[str]
    per_class: list[float]
    per_class_intervals: list[Interval]
    confusion: ConfusionMatrix
