"""Test that metrics equal slow definitions, or those of scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from semiscale.evaluation import metrics
from semiscale.evaluation.metrics import Labels

IMAGES, CLASSES = 400, 7


def drawn(seed: int) -> tuple[Labels, "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]:
    """Return labels_B and softmax probabilities_BC that favour the label."""
    random = np.random.default_rng(seed)
    labels_B = random.integers(0, CLASSES, IMAGES).astype(np.int32)
    logits_BC = random.normal(size=(IMAGES, CLASSES)) + 2 * np.eye(CLASSES)[labels_B]
    probability_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(1, keepdims=True)
    return labels_B, probability_BC.astype(np.float32)


def top(probability_BC: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> Labels:
    return np.argsort(-probability_BC, axis=1)[:, :5].astype(np.int32)


@pytest.mark.parametrize("ranks", [1, 5])
def test_accuracy(ranks: int) -> None:
    labels_B, probability_BC = drawn(0)
    share = metrics.topk_correct(top(probability_BC), labels_B, ranks).mean()
    assert share == pytest.approx(top_k_accuracy_score(labels_B, probability_BC, k=ranks))


def test_calibration_error() -> None:
    labels_B, probability_BC = drawn(1)
    best_B, probability_B = probability_BC.argmax(1), probability_BC.max(1)
    right_B = best_B == labels_B
    expected = 0.0
    for number in range(metrics.ECE_BINS):
        low, high = number / metrics.ECE_BINS, (number + 1) / metrics.ECE_BINS
        inside = [image for image in range(IMAGES) if low < probability_B[image] <= high]
        if inside:
            share = sum(right_B[image] for image in inside) / len(inside)
            mean = sum(float(probability_B[image]) for image in inside) / len(inside)
            expected += len(inside) / IMAGES * abs(share - mean)
    terms = metrics.calibration_bin_terms(right_B, probability_B)
    assert metrics.expected_calibration_error(terms.mean(0)) == pytest.approx(expected)


@pytest.mark.parametrize(("probability", "column"), [(0.0, 0), (0.0666, 0), (0.0667, 1), (0.5, 7), (1.0, 14)])
def test_the_edges_of_the_bins(probability: float, column: int) -> None:
    terms = metrics.calibration_bin_terms(np.array([True]), np.array([probability], np.float32))
    assert np.flatnonzero(terms[0]).tolist() == ([column] if probability < 1 else [])


def test_resampling_equals_drawing_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random((50, 3))
    random = np.random.default_rng(5)
    expected = [values[random.integers(0, 50, 50)].mean(0) for _ in range(metrics.BOOTSTRAP_SAMPLES)]
    assert metrics.bootstrap_means(values, seed=5) == pytest.approx(np.array(expected))
    monkeypatch.setattr(metrics, "MAX_DRAWS_IN_MEMORY", 1000)  # twenty draws at a time
    assert metrics.bootstrap_means(values, seed=5) == pytest.approx(np.array(expected))


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    right_B = np.arange(2000) < 1500
    low, high = metrics.percentile_interval(metrics.bootstrap_means(right_B[:, None].astype(float))[:, 0])
    assert (low, high) == pytest.approx(binom(2000, 0.75).ppf([0.025, 0.975]) / 2000, abs=0.002)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        right_B = random.random(300) < 0.8
        low, high = metrics.percentile_interval(metrics.bootstrap_means(right_B[:, None].astype(float))[:, 0])
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize("images", [1, 8, 300])
def test_images_that_are_all_alike_do_not_make_sure(images: int) -> None:
    alike = np.ones(metrics.BOOTSTRAP_SAMPLES)
    exact = binomtest(images, images).proportion_ci(0.95)
    assert metrics.proportion_interval(1.0, images, alike) == pytest.approx((exact.low, 1), abs=1e-6)
    assert metrics.proportion_interval(0.0, images, 0 * alike) == pytest.approx((0, 1 - exact.low), abs=1e-6)


@pytest.mark.parametrize(("images", "too_sure"), [(200, 0.0), (1000, 0.03), (1000, 0.1)])
def test_the_interval_of_the_calibration_error_covers_the_truth(images: int, too_sure: float) -> None:
    """Of a model whose answers are right less often than it says, by the same share at every probability."""
    random = np.random.default_rng(8)
    covered = 0
    for _ in range(60):
        probability_B = random.uniform(0.4, 1, images).astype(np.float32)
        terms = metrics.calibration_bin_terms(random.random(images) < probability_B - too_sure, probability_B)
        low, high = metrics.calibration_interval(terms.mean(0), metrics.bootstrap_means(terms))
        assert low <= metrics.expected_calibration_error(terms.mean(0)) <= high
        covered += low <= too_sure <= high
    assert covered >= 0.93 * 60


def test_shares_by_class() -> None:
    labels_B, probability_BC = drawn(4)
    right_B = probability_BC.argmax(1) == labels_B
    shares, intervals = metrics.per_class_accuracy(right_B, labels_B, CLASSES)
    for label, (share, (low, high)) in enumerate(zip(shares, intervals, strict=True)):
        assert share == pytest.approx(right_B[labels_B == label].mean())
        assert low <= share <= high
        assert high - low > 0.05


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 3), (7, 2), (40, 61), (3, 3), (900, 1011)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    ties = 50
    model_B = np.array([True] * (wins + ties) + [False] * losses)
    other_B = np.array([False] * wins + [True] * (ties + losses))
    found = metrics.compare_paired("student", model_B, "champion", other_B)
    assert (found.wins, found.losses) == (wins, losses)
    assert found.difference == pytest.approx((wins - losses) / len(model_B))
    assert found.interval[0] <= found.difference <= found.interval[1]
    if wins + losses:
        assert found.p_value == pytest.approx(binomtest(wins, wins + losses).pvalue)
        assert found.p_worse == pytest.approx(binomtest(wins, wins + losses, alternative="less").pvalue)
    else:
        assert (found.p_value, found.p_worse) == (1, 1)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    random = np.random.default_rng(6)
    other_B = random.random(1000) < 0.7
    model_B = other_B | (random.random(1000) < 0.05)
    paired = metrics.compare_paired("student", model_B, "champion", other_B)
    alone = metrics.percentile_interval(metrics.bootstrap_means(model_B[:, None].astype(float))[:, 0])
    assert paired.interval[0] > 0
    assert paired.interval[1] - paired.interval[0] < (alone[1] - alone[0]) / 2


def test_confusion() -> None:
    labels_B, probability_BC = drawn(7)
    best_B = top(probability_BC)[:, 0]
    found = metrics.confusion_matrix(labels_B, best_B, [f"class {number}" for number in range(CLASSES)])
    assert found.counts == confusion_matrix(labels_B, best_B, labels=range(CLASSES)).tolist()


def test_of_many_classes_the_most_confused_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONFUSION_CLASSES", 3)
    labels_B = np.array([0, 0, 1, 1, 2, 3, 4], np.int32)
    best_B = np.array([0, 0, 3, 3, 2, 1, 4], np.int32)
    found = metrics.confusion_matrix(labels_B, best_B, list("abcde"))
    assert found.classes == ["b", "d", metrics.OTHERS]
    assert found.counts == [[0, 2, 0], [1, 0, 0], [0, 0, 4]]
