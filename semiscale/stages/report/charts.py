"""Compute the geometry of line charts. The template draws them and escapes their text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

MIN_LOSS = 1e-4
# A line of at most this many points shows a dot for each.
MAX_DOTS = 12
_MAX_TICK_INTERVALS = 6
# Losses whose ratio is larger need a log axis. A linear axis would show only the first steps.
_LOG_RATIO = 100
_UNITS = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"), (0, ""))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class PlotArea:
    """The size of the drawing and the edges of the plot, in SVG units.

    A unit is about one pixel on the page.
    """

    width: int = 360
    height: int = 226
    left: int = 46
    right: int = 346
    top: int = 10
    bottom: int = 186


FRAME = PlotArea()


@dataclass(frozen=True)
class Series:
    """A line: its name, its CSS classes, and its points in order of x."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Scale:
    """An axis: its range of values, and its ticks with their texts."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value on the axis: 0 at the low end, 1 at the high end.

        A value below the low end has position 0.
        """
        transform = math.log10 if self.log else float
        value = max(value, self.low)
        return (transform(value) - transform(self.low)) / (transform(self.high) - transform(self.low))


@dataclass(frozen=True)
class DrawnSeries:
    """A series in SVG units: the points of its polyline, and its dots."""

    name: str
    style: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawn chart. A tick is (position in SVG units, text)."""

    title: str
    summary: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[DrawnSeries]


def chart(title: str, series: Sequence[Series], y: Callable[[Sequence[float]], Scale]) -> Chart:
    """Draw series of (images processed, value) on one pair of axes.

    Args:
        title: Title of the chart.
        series: The lines. At least one has a point.
        y: Function that makes the y axis from the values of all lines.

    Returns:
        The chart. For readers who cannot see it, its `summary` names the last value of each line.
    """
    highest = max(images for line in series for images, _ in line.points)
    x_scale = images_scale(highest)
    y_scale = y([value for line in series for _, value in line.points])
    title += ", log scale" if y_scale.log else ""
    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in series if line.points)
    return Chart(
        title=title,
        summary=f"{title} by images processed: {ends}",
        x_label=f"images processed{_unit(highest)[1]}",
        x_ticks=[(_x_position(x_scale, value), text) for value, text in x_scale.ticks],
        y_ticks=[(_y_position(y_scale, value), text) for value, text in y_scale.ticks],
        lines=[_draw_series(line, x_scale, y_scale) for line in series if line.points],
    )


def images_scale(highest: float) -> Scale:
    """Return an axis of images processed, from 0 to the highest, with round ticks."""
    unit, step = _unit(highest)[0], nice_tick_step(highest)
    values = [step * number for number in range(math.floor(highest / step + 1e-9) + 1)]
    ticks = [(value, f"{value / unit:.10g}") for value in values]
    return Scale(0, highest, ticks)


def loss_scale(values: Sequence[float]) -> Scale:
    """Return an axis from 0 to a round value, or a log axis if the losses differ a lot.

    A loss below MIN_LOSS is drawn as MIN_LOSS, for the loss of an overfitted network reaches 0.
    """
    least = max(min(values), MIN_LOSS)
    if max(values) > _LOG_RATIO * least:
        return log_scale([least, max(values)])
    return _rounded(0, max(values), lambda value: f"{value:.10g}")


def percent_scale(values: Sequence[float]) -> Scale:
    """Return an axis between the round percentages around the fractions."""
    return _rounded(min(values), max(values), lambda value: f"{100 * value:.10g}%")


def log_scale(values: Sequence[float]) -> Scale:
    """Return a log axis between the powers of ten around the positive values."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    step = math.ceil((high - low) / _MAX_TICK_INTERVALS)
    ticks = [(10.0**power, _power_of_ten(power)) for power in range(low, high + 1, step)]
    return Scale(10.0**low, 10.0**high, ticks, log=True)


def nice_tick_step(span: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten with few enough intervals.

    The span has at most _MAX_TICK_INTERVALS of them.
    """
    magnitude = 10.0 ** math.floor(math.log10(span / _MAX_TICK_INTERVALS))
    return next(
        step * magnitude for step in (1, 2, 5, 10) if span <= _MAX_TICK_INTERVALS * step * magnitude * (1 + 1e-9)
    )


def _rounded(low: float, high: float, text: Callable[[float], str]) -> Scale:
    """Widen a range to round ticks at both ends. An empty range becomes 0.05 wide."""
    step = nice_tick_step(max(high - low, 0.05))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [(step * number, text(step * number)) for number in range(first, last + 1)]
    return Scale(ticks[0][0], ticks[-1][0], ticks)


def _unit(highest: float) -> tuple[float, str]:
    """Return the unit of ticks up to this value, and its name on the axis."""
    unit, words = next((unit, words) for unit, words in _UNITS if highest >= unit)
    return unit or 1, words


def _power_of_ten(power: int) -> str:
    return "1" if power == 0 else f"10{str(power).translate(_SUPERSCRIPTS)}"


def _draw_series(series: Series, x: Scale, y: Scale) -> DrawnSeries:
    positions = [(_x_position(x, images), _y_position(y, value)) for images, value in series.points]
    path = " ".join(f"{x_position:g},{y_position:g}" for x_position, y_position in positions)
    return DrawnSeries(series.name, series.style, path, positions if len(positions) <= MAX_DOTS else [])


def _x_position(scale: Scale, value: float) -> float:
    return round(FRAME.left + scale.share(value) * (FRAME.right - FRAME.left), 1)


def _y_position(scale: Scale, value: float) -> float:
    return round(FRAME.bottom - scale.share(value) * (FRAME.bottom - FRAME.top), 1)
