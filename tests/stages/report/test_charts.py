"""Test the charts: their scales, ticks and lines."""

import pytest

from semiscale.stages.report import charts


def test_axes_have_round_ticks() -> None:
    assert [text for _, text in charts.images_scale(1_038_000_000).ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in charts.percent_scale([0.41, 0.733]).ticks] == ["40%", "50%", "60%", "70%", "80%"]
    assert [text for _, text in charts.loss_scale([2.3, 0.4]).ticks] == ["0", "0.5", "1", "1.5", "2", "2.5"]
    assert [text for _, text in charts.log_scale([0.6, 0.00007]).ticks] == [
        "10⁻⁵",
        "10⁻⁴",
        "10⁻³",
        "10⁻²",
        "10⁻¹",
        "1",
    ]


def test_losses_that_differ_a_lot_are_drawn_on_a_log_scale() -> None:
    scale = charts.loss_scale([2.3, 0.0])
    assert [text for _, text in scale.ticks] == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1", "10¹"]
    assert scale.share(0.0) == 0


@pytest.mark.parametrize("scale", [charts.percent_scale([0.5]), charts.loss_scale([1e-9]), charts.log_scale([0.1])])
def test_a_scale_of_a_single_value_has_a_width(scale: charts.Scale) -> None:
    assert len(scale.ticks) >= 2
    assert scale.low < scale.high


def test_a_line_spans_the_plot_area() -> None:
    chart = charts.chart("Top-1", [charts.Series("one", "student", [(0, 1.0), (1000, 0.0)])], charts.percent_scale)
    frame = charts.FRAME
    assert chart.lines[0].path == f"{frame.left},{frame.top} {frame.right},{frame.bottom}"
    assert chart.x_label == "images processed, thousands"
    assert chart.summary == "Top-1 by images processed: one ends at 0"
