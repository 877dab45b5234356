"""Compute metrics, confidence intervals and paired comparisons of classifiers.

Every metric is computed from means over images, so that one bootstrap serves all. It draws as many images with
replacement and takes the mean, a thousand times (Efron and Tibshirani 1993, chapter 13). The seed fixes the draws. Two
models that are measured on the same images are resampled alike.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from semiscale.receipts.evaluate import ConfusionMatrix, Interval, PairedComparison

if TYPE_CHECKING:
    from torch import Tensor

# Bins of equal width, as in Guo et al. 2017 (arXiv:1706.04599).
ECE_BINS = 15
BOOTSTRAP_SAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
SEED = 0
MAX_DRAWS_IN_MEMORY = 8_000_000
# A person can read a confusion matrix of this size.
MAX_CONFUSION_CLASSES = 30
OTHERS = "all other classes"

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Labels = NDArray[np.int32]


@overload
def topk_correct(ranked_BR: Labels, labels_B: Labels, k: int) -> Bools: ...
@overload
def topk_correct(ranked_BR: "Tensor", labels_B: "Tensor", k: int) -> "Tensor": ...
def topk_correct(ranked_BR: Any, labels_B: Any, k: int) -> Any:
    """Return for every image whether its label is among its k best classes.

    Args:
        ranked_BR: Best classes of each image, best first. R is at least k, or the number of all classes.
        labels_B: True class of each image.
        k: Number of classes that count as an answer.

    Returns:
        bool, one for each image, as an array or a tensor like the arguments.
    """
    return (ranked_BR[:, :k] == labels_B[:, None]).any(1)


def calibration_bin_terms(right_B: Bools, probability_B: NDArray[np.float32]) -> Floats:
    """Return the calibration terms of each image.

    Bin k holds the probabilities in (k / ECE_BINS, (k + 1) / ECE_BINS].

    Args:
        right_B: Whether the best class of each image is correct.
        probability_B: Probability of that class.

    Returns:
        (B, ECE_BINS): correct - probability in the column of the image's bin, and zeros elsewhere.
    """
    bin_B = np.clip(np.ceil(probability_B.astype(float) * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    terms = np.zeros((len(right_B), ECE_BINS))
    terms[np.arange(len(right_B)), bin_B] = right_B - probability_B.astype(float)
    return terms


def expected_calibration_error(means: Floats) -> Floats:
    """Return the expected calibration error from mean calibration terms.

    It is the sum over bins of (images in the bin / images) x |accuracy - mean probability|, as in Guo et al. 2017,
    equation 3.
    """
    return np.asarray(np.abs(means).sum(-1))


def bootstrap_means(values: Floats, seed: int = SEED) -> Floats:
    """Return the column means of bootstrap samples of images.

    Cost: BOOTSTRAP_SAMPLES x images draws, and M times as many multiplications. For 50,000 images and ten columns this
    takes a second. At most MAX_DRAWS_IN_MEMORY draws are in memory.

    Args:
        values: (images, M).
        seed: Seed of the draws.

    Returns:
        (BOOTSTRAP_SAMPLES, M).
    """
    images = len(values)
    random = np.random.default_rng(seed)
    at_once = max(MAX_DRAWS_IN_MEMORY // images, 1)
    parts = []
    for start in range(0, BOOTSTRAP_SAMPLES, at_once):
        draws = min(at_once, BOOTSTRAP_SAMPLES - start)
        drawn = random.integers(0, images, (draws, images)) + images * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images)
        parts.append(counts @ values / images)
    return np.concatenate(parts)


def percentile_interval(resampled: Floats) -> Interval:
    """Return the percentile interval of bootstrapped values."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def proportion_interval(share: float, images: int, resampled: Floats) -> Interval:
    """Return the confidence interval of a share of images.

    If all images are correct, or all are wrong, so are all resampled images. One end is then the exact binomial bound
    (Clopper and Pearson 1934), which is 63% for eight correct images of eight.

    Args:
        share: Measured share, in [0, 1].
        images: Number of images.
        resampled: Shares of the bootstrap samples.
    """
    low, high = percentile_interval(resampled)
    least = round(((1 - CONFIDENCE_LEVEL) / 2) ** (1 / images), 6)
    return (least, high) if share == 1 else (low, 1 - least) if share == 0 else (low, high)


def calibration_interval(means: Floats, resampled: Floats) -> Interval:
    """Return a conservative confidence interval of the calibration error.

    The error is a sum of absolute values, so noise in the bins adds to it. Resampling adds noise once more. The
    percentiles are therefore too high if the true error is small, and may exceed the measured error. By the triangle
    inequality the measured error is off by at most the sum of |resampled - measured| over the bins. This gives the
    lower end. The upper end is the percentile, which is biased upwards.

    Args:
        means: Means of the calibration terms, (ECE_BINS,).
        resampled: Means of the bootstrap samples, (BOOTSTRAP_SAMPLES, ECE_BINS).
    """
    measured = float(expected_calibration_error(means))
    wrong = float(np.quantile(np.abs(resampled - means).sum(-1), (1 + CONFIDENCE_LEVEL) / 2))
    return round(max(measured - wrong, 0.0), 6), percentile_interval(expected_calibration_error(resampled))[1]


def per_class_accuracy(right_B: Bools, labels_B: Labels, classes: int) -> tuple[list[float], list[Interval]]:
    """Return the accuracy of each class and its confidence interval.

    Images are resampled within their class. The mean of n such draws is binomial and is drawn directly.

    Args:
        right_B: Whether each image is classified correctly.
        labels_B: True classes. Every class has an image.
        classes: Number of classes.
    """
    images = np.bincount(labels_B, minlength=classes)
    shares = np.bincount(labels_B, weights=right_B, minlength=classes) / images
    resampled = np.random.default_rng(SEED).binomial(images, shares, (BOOTSTRAP_SAMPLES, classes)) / images
    per_class = zip(shares.tolist(), images.tolist(), resampled.T, strict=True)
    return shares.tolist(), [proportion_interval(*values) for values in per_class]


def compare_paired(name: str, right_B: Bools, against: str, other_B: Bools) -> PairedComparison:
    """Compare two models by McNemar's exact test and a bootstrap interval.

    Args:
        name: Name of the first model.
        right_B: Whether it classifies each image correctly.
        against: Name of the second model.
        other_B: Whether that one classifies each image correctly.
    """
    wins, losses = int((right_B & ~other_B).sum()), int((other_B & ~right_B).sum())
    difference_B1 = (right_B.astype(float) - other_B)[:, None]
    return PairedComparison(
        model=name,
        against=against,
        wins=wins,
        losses=losses,
        difference=float(difference_B1.mean()),
        interval=percentile_interval(bootstrap_means(difference_B1)[:, 0]),
        p_value=min(1.0, 2 * binomial_cdf(min(wins, losses), wins + losses)),
        p_worse=binomial_cdf(wins, wins + losses),
    )


def binomial_cdf(heads: int, tosses: int) -> float:
    """Return the exact probability of at most this many heads of a fair coin.

    If two models are equal, an image that only one classifies correctly is equally likely to be either's (McNemar
    1947).

    Cost: a tenth of a second for 10,000 tosses.

    Args:
        heads: Largest number of heads.
        tosses: Number of tosses.
    """
    term = total = 1
    for number in range(1, heads + 1):
        term = term * (tosses - number + 1) // number
        total += term
    return total / (1 << tosses)


def confusion_matrix(labels_B: Labels, best_B: Labels, classes: Sequence[str]) -> ConfusionMatrix:
    """Count the images of each true class (row) by predicted class (column).

    Above MAX_CONFUSION_CLASSES classes, those with the most confusions have their own rows. The others share one row.

    Args:
        labels_B: True classes.
        best_B: Predicted classes.
        classes: Names of the classes.
    """
    counts = _count_pairs(labels_B, best_B, len(classes))
    if len(classes) <= MAX_CONFUSION_CLASSES:
        return ConfusionMatrix(classes=list(classes), counts=counts.tolist())
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[: MAX_CONFUSION_CLASSES - 1])
    index = np.full(len(classes), len(shown), np.int32)
    index[shown] = np.arange(len(shown))
    names = [*(classes[number] for number in shown), OTHERS]
    return ConfusionMatrix(classes=names, counts=_count_pairs(index[labels_B], index[best_B], len(names)).tolist())


def _count_pairs(labels_B: Labels, best_B: Labels, classes: int) -> NDArray[np.int64]:
    return np.bincount(labels_B.astype(int) * classes + best_B, minlength=classes**2).reshape(classes, classes)
