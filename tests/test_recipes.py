"""The learning-rate schedules, against values worked out by hand from section 4.1."""

import pytest

from components.train.recipes import RECIPES, learning_rate

PEAK = 0.1 / 256 * 1536  # 0.6
BILLION = 1_000_000_000


@pytest.mark.parametrize(
    ("images", "rate"),
    [
        (0, 0.1),  # "a warm-up from 0.1 to 0.1/256 x 1536"
        (3_200_000, (0.1 + PEAK) / 2),
        (6_400_000, PEAK),
        (BILLION // 14, PEAK),  # the last image of the first of 14 parts: 13 reductions
        (BILLION // 14 + 1, PEAK / 2),
        (BILLION * 7 // 14, PEAK / 2**7),
        (BILLION - 1, PEAK / 2**13),
    ],
)
def test_pretraining(images: int, rate: float) -> None:
    assert learning_rate(RECIPES["pretrain"], 0.1, 1536, images, BILLION) == pytest.approx(rate)


@pytest.mark.parametrize(("quarter", "rate"), [(0, 0.0015), (1, 0.00015), (2, 0.000015), (3, 0.0000015)])
def test_finetuning_has_three_drops_by_ten_and_no_warmup(quarter: int, rate: float) -> None:
    # 0.00025/256 x 1536 = 0.0015
    for images in (quarter * 100, quarter * 100 + 99):
        assert learning_rate(RECIPES["finetune"], 0.00025, 1536, images, 400) == pytest.approx(rate)


def test_a_small_minibatch_never_starts_above_its_peak() -> None:
    rates = [learning_rate(RECIPES["pretrain"], 0.1, 64, images, 100_000) for images in range(0, 100_000, 64)]
    assert max(rates) == rates[0] == pytest.approx(0.1 * 64 / 256)
    assert rates == sorted(rates, reverse=True)


def test_the_number_of_reductions_does_not_depend_on_the_length() -> None:
    for total in (1_400, 140_000, 140_000_000):
        rates = {
            learning_rate(RECIPES["pretrain"], 0.1, 256, total * part // 280 + 1, total) for part in range(10, 280)
        }
        assert len(rates) == 14
