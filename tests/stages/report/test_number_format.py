"""Test how the report formats numbers."""

import pytest

from semiscale.common.text import count_noun
from semiscale.stages.report import number_format


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (number_format.number(1234567), "1,234,567"),
        (count_noun(1, "tar"), "1 tar"),
        (count_noun(2000, "tar"), "2,000 tars"),
        (number_format.percent(0.841), "84.10%"),
        (number_format.percent(1.0), "100.00%"),
        (number_format.percent(0.999999), ">99.99%"),
        (number_format.percent(0.000001), "<0.01%"),
        (number_format.percent(0.0, 1), "0.0%"),
        (number_format.percentage_points(0.031), "+3.10"),
        (number_format.percentage_points(-0.004), "−0.40"),
        (number_format.percentage_points(-0.00001), "0.00"),
        (number_format.compare_in_words(-0.004), "0.40 points below"),
        (number_format.compare_in_words(0.0), "equal to"),
        (number_format.probability(0.0), "50.00%"),
        (number_format.probability(-800.0), "<0.01%"),
        (number_format.probability(800.0), ">99.99%"),
        (number_format.p_value(0.0341), "0.034"),
        (number_format.p_value(0.00002), "<0.001"),
        (number_format.format_learning_rate(0.00025), "0.00025"),
        (number_format.format_learning_rate(0.000001), "0.000001"),
        (number_format.format_learning_rate(10.0), "10"),
        (number_format.duration(0.0063), "0.006 s"),
        (number_format.duration(0.0), "0 s"),
        (number_format.duration(59.97), "1 min 00 s"),
        (number_format.duration(4.24), "4.2 s"),
        (number_format.duration(192), "3 min 12 s"),
        (number_format.duration(3_600_000), "1,000 h 00 min"),
        (number_format.size(812), "812 bytes"),
        (number_format.size(1_200_000_000), "1.2 GB"),
    ],
)
def test_numbers_are_formatted_for_people(formatted: str, expected: str) -> None:
    assert formatted == expected
