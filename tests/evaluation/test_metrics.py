"""Test that metrics equal slow definitions, or those of scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from semiscale.evaluation import metrics
from semiscale.evaluation.metrics import Labels

IMAGES, CLASSES = 400, 7


def draw_predictions(seed: int) -> tuple[Labels, "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]:
    """Return labels_B and softmax probabilities_BC that favour the label."""
    random = np.random.default_rng(seed)
    labels_B = random.integers(0, CLASSES, IMAGES).astype(np.int32)
    logits_BC = random.normal(size=(IMAGES, CLASSES)) + 2 * np.eye(CLASSES)[labels_B]
    probability_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(1, keepdims=True)
    return labels_B, probability_BC.astype(np.float32)


def top_classes(probability_BC: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> Labels:
    """Return the five most probable classes of each image, top_BR."""
    return np.argsort(-probability_BC, axis=1)[:, :5].astype(np.int32)


@pytest.mark.parametrize("ranks", [1, 5])
def test_accuracy_equals_scikit_learns(ranks: int) -> None:
    labels_B, probability_BC = draw_predictions(0)
    share = metrics.topk_correct(top_classes(probability_BC), labels_B, ranks).mean()
    assert share == pytest.approx(top_k_accuracy_score(labels_B, probability_BC, k=ranks))


def test_the_calibration_error_equals_its_definition() -> None:
    labels_B, probability_BC = draw_predictions(1)
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
def test_a_probability_falls_into_the_right_bin(probability: float, column: int) -> None:
    terms = metrics.calibration_bin_terms(np.array([True]), np.array([probability], np.float32))
    assert np.flatnonzero(terms[0]).tolist() == ([column] if probability < 1 else [])


def test_resampling_equals_drawing_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random((50, 3))
    random = np.random.default_rng(5)
    expected = [values[random.integers(0, 50, 50)].mean(0) for _ in range(metrics.BOOTSTRAP_SAMPLES)]
    assert metrics.bootstrap_means(values, seed=5) == pytest.approx(np.array(expected))
    # The limit allows twenty draws at a time.
    monkeypatch.setattr(metrics, "MAX_DRAWS_IN_MEMORY", 1000)
    assert metrics.bootstrap_means(values, seed=5) == pytest.approx(np.array(expected))


def test_the_interval_of_a_share_is_the_binomial_interval() -> None:
    right_B = np.arange(2000) < 1500
    low, high = metrics.percentile_interval(metrics.bootstrap_means(right_B[:, None].astype(float))[:, 0])
    assert (low, high) == pytest.approx(binom(2000, 0.75).ppf([0.025, 0.975]) / 2000, abs=0.002)


def test_the_interval_covers_the_truth_at_its_level() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        right_B = random.random(300) < 0.8
        low, high = metrics.percentile_interval(metrics.bootstrap_means(right_B[:, None].astype(float))[:, 0])
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize("images", [1, 8, 300])
def test_equal_outcomes_do_not_give_an_interval_of_zero_width(images: int) -> None:
    alike = np.ones(metrics.BOOTSTRAP_SAMPLES)
    exact = binomtest(images, images).proportion_ci(0.95)
    assert metrics.proportion_interval(1.0, images, alike) == pytest.approx((exact.low, 1), abs=1e-6)
    assert metrics.proportion_interval(0.0, images, 0 * alike) == pytest.approx((0, 1 - exact.low), abs=1e-6)


@pytest.mark.parametrize(("images", "overconfidence"), [(200, 0.0), (1000, 0.03), (1000, 0.1)])
def test_the_interval_of_the_calibration_error_covers_the_truth(images: int, overconfidence: float) -> None:
    # The accuracy of the model is below its confidence by the same share at every probability.
    random = np.random.default_rng(8)
    covered = 0
    for _ in range(60):
        probability_B = random.uniform(0.4, 1, images).astype(np.float32)
        terms = metrics.calibration_bin_terms(random.random(images) < probability_B - overconfidence, probability_B)
        low, high = metrics.calibration_interval(terms.mean(0), metrics.bootstrap_means(terms))
        assert low <= metrics.expected_calibration_error(terms.mean(0)) <= high
        covered += low <= overconfidence <= high
    assert covered >= 0.93 * 60


def test_the_accuracy_of_each_class_has_an_interval() -> None:
    labels_B, probability_BC = draw_predictions(4)
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
    comparison = metrics.compare_paired("student", model_B, "champion", other_B)
    assert (comparison.wins, comparison.losses) == (wins, losses)
    assert comparison.difference == pytest.approx((wins - losses) / len(model_B))
    assert comparison.interval[0] <= comparison.difference <= comparison.interval[1]
    if wins + losses:
        assert comparison.p_value == pytest.approx(binomtest(wins, wins + losses).pvalue)
        assert comparison.p_worse == pytest.approx(binomtest(wins, wins + losses, alternative="less").pvalue)
    else:
        assert (comparison.p_value, comparison.p_worse) == (1, 1)


def test_a_paired_difference_has_a_narrower_interval() -> None:
    random = np.random.default_rng(6)
    other_B = random.random(1000) < 0.7
    model_B = other_B | (random.random(1000) < 0.05)
    paired = metrics.compare_paired("student", model_B, "champion", other_B)
    alone = metrics.percentile_interval(metrics.bootstrap_means(model_B[:, None].astype(float))[:, 0])
    assert paired.interval[0] > 0
    assert paired.interval[1] - paired.interval[0] < (alone[1] - alone[0]) / 2


def test_the_confusion_matrix_equals_scikit_learns() -> None:
    labels_B, probability_BC = draw_predictions(7)
    best_B = top_classes(probability_BC)[:, 0]
    confusion = metrics.confusion_matrix(labels_B, best_B, [f"class {number}" for number in range(CLASSES)])
    assert confusion.counts == confusion_matrix(labels_B, best_B, labels=range(CLASSES)).tolist()


def test_of_many_classes_the_most_confused_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONFUSION_CLASSES", 3)
    labels_B = np.array([0, 0, 1, 1, 2, 3, 4], np.int32)
    best_B = np.array([0, 0, 3, 3, 2, 1, 4], np.int32)
    confusion = metrics.confusion_matrix(labels_B, best_B, list("abcde"))
    assert confusion.classes == ["b", "d", metrics.OTHERS]
    assert confusion.counts == [[0, 2, 0], [1, 0, 0], [0, 0, 4]]
