"""Measures of a classifier on labeled images: what they are, how sure they are, and how two models compare.

Everything is a mean over images, so that one way of resampling images serves all: draw as many images with replacement,
take the mean again, a thousand times (Efron and Tibshirani 1993, chapter 13). The seed fixes the draws, and two models
that are measured on the same images are resampled alike.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from semiscale.receipts.evaluate import ConfusionMatrix, Interval, PairedComparison

if TYPE_CHECKING:
    from torch import Tensor

ECE_BINS = 15  # of the calibration error, equally wide, as in Guo et al. 2017 (arXiv:1706.04599)
BOOTSTRAP_SAMPLES = 1000
CONFIDENCE_LEVEL = 0.95  # what an interval covers
SEED = 0
MAX_DRAWS_IN_MEMORY = 8_000_000  # draws in memory at a time
MAX_CONFUSION_CLASSES = 30  # of a confusion matrix that a person reads
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
    """Return (right - probability) of each image in the column of its probability's bin, zeros elsewhere: (B, BINS).

    A bin holds the probabilities in (k/BINS, (k+1)/BINS].
    """
    bin_B = np.clip(np.ceil(probability_B.astype(float) * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    terms = np.zeros((len(right_B), ECE_BINS))
    terms[np.arange(len(right_B)), bin_B] = right_B - probability_B.astype(float)
    return terms


def expected_calibration_error(means: Floats) -> Floats:
    """Return the expected calibration error from the means of the calibration terms, over their last axis.

    sum over bins of (images in the bin / images) x |share right - mean probability|: Guo et al. 2017, equation 3.
    """
    return np.asarray(np.abs(means).sum(-1))


def bootstrap_means(values: Floats, seed: int = SEED) -> Floats:
    """Return the column means of `values` (images, M) under RESAMPLES draws of images: (RESAMPLES, M).

    Time: RESAMPLES x images draws and as many x M multiplications; a second for 50,000 images and ten columns. Memory:
    HELD draws.
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
    """Return the percentile interval of a resampled number."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def proportion_interval(share: float, images: int, resampled: Floats) -> Interval:
    """Return the interval of a share of the images.

    Images that are all right, or all wrong, are so however they are resampled, and yet the next one may be otherwise:
    there the far end is the exact binomial one (Clopper and Pearson 1934), for eight right of eight 63%.
    """
    low, high = percentile_interval(resampled)
    least = round(((1 - CONFIDENCE_LEVEL) / 2) ** (1 / images), 6)
    return (least, high) if share == 1 else (low, 1 - least) if share == 0 else (low, high)


def calibration_interval(means: Floats, resampled: Floats) -> Interval:
    """Return the interval of the calibration error, from the means of its terms and resampled means.

    The error is a sum of absolute values, so that chance in the bins adds to it, and to the resampled one once more:
    their percentiles lie above the truth where that is small, and even above what was measured. By the triangle
    inequality what was measured is wrong by the sum of |resampled - measured| at most, over the bins: that gives the
    lower end. The upper end is the percentile, which errs upwards. Together they cover no less than they say.
    """
    measured = float(expected_calibration_error(means))
    wrong = float(np.quantile(np.abs(resampled - means).sum(-1), (1 + CONFIDENCE_LEVEL) / 2))
    return round(max(measured - wrong, 0.0), 6), percentile_interval(expected_calibration_error(resampled))[1]


def per_class_accuracy(right_B: Bools, labels_B: Labels, classes: int) -> tuple[list[float], list[Interval]]:
    """Return the share of right images of each class, and its interval; every class has an image.

    Images are resampled within their class: the mean of n such draws is binomial, which is drawn directly.
    """
    images = np.bincount(labels_B, minlength=classes)
    shares = np.bincount(labels_B, weights=right_B, minlength=classes) / images
    resampled = np.random.default_rng(SEED).binomial(images, shares, (BOOTSTRAP_SAMPLES, classes)) / images
    found = zip(shares.tolist(), images.tolist(), resampled.T, strict=True)
    return shares.tolist(), [proportion_interval(*one) for one in found]


def compare_paired(name: str, right_B: Bools, against: str, other_B: Bools) -> PairedComparison:
    """Compare two models on the same images: McNemar's exact test, and the difference with its bootstrap interval."""
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
    """Return the probability of at most so many heads in tosses of a fair coin, by whole numbers.

    Of the images that only one of two equal models gets right, each is as likely to be the one's as the other's
    (McNemar 1947). Costs a tenth of a second for 10,000 tosses.
    """
    term = total = 1
    for number in range(1, heads + 1):
        term = term * (tosses - number + 1) // number
        total += term
    return total / (1 << tosses)


def confusion_matrix(labels_B: Labels, best_B: Labels, classes: Sequence[str]) -> ConfusionMatrix:
    """Count the images of each class (row) by the class they were given (column).

    Of more than MOST_CLASSES classes those with the most confusions are told apart, the others are counted together.
    """
    counts = _counts(labels_B, best_B, len(classes))
    if len(classes) <= MAX_CONFUSION_CLASSES:
        return ConfusionMatrix(classes=list(classes), counts=counts.tolist())
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[: MAX_CONFUSION_CLASSES - 1])
    place = np.full(len(classes), len(shown), np.int32)
    place[shown] = np.arange(len(shown))
    names = [*(classes[number] for number in shown), OTHERS]
    return ConfusionMatrix(classes=names, counts=_counts(place[labels_B], place[best_B], len(names)).tolist())


def _counts(labels_B: Labels, best_B: Labels, classes: int) -> NDArray[np.int64]:
    return np.bincount(labels_B.astype(int) * classes + best_B, minlength=classes**2).reshape(classes, classes)
