"""Line charts as geometry: where ticks, lines and dots fall. The template draws them and escapes what they say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

MIN_LOSS = 1e-4
MAX_DOTS = 12  # a line of so few points shows each of them
_MOST_PARTS = 6  # of an axis, between ticks
_LOG_RATIO = 100  # of two losses: beyond it a linear axis shows the first steps and nothing else
_UNITS = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"), (0, ""))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class PlotArea:
    """The drawing and the plot's edges inside it, in SVG units; charts are shown at about one pixel a unit."""

    width: int = 360
    height: int = 226
    left: int = 46
    right: int = 346
    top: int = 10
    bottom: int = 186


FRAME = PlotArea()


@dataclass(frozen=True)
class Series:
    """One line: its name, the CSS classes it is drawn with, its points in order of x."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Scale:
    """An axis: the range of values it shows, and its ticks with their texts."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value falls: 0 at the low end, which is also for what lies below it, 1 at the high end."""
        measure = math.log10 if self.log else float
        value = max(value, self.low)
        return (measure(value) - measure(self.low)) / (measure(self.high) - measure(self.low))


@dataclass(frozen=True)
class DrawnSeries:
    """A series in SVG units: `path` for a polyline, and the dots to draw on it."""

    name: str
    style: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ticks are (place in SVG units, text)."""

    title: str
    summary: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[DrawnSeries]


def chart(title: str, series: Sequence[Series], y: Callable[[Sequence[float]], Scale]) -> Chart:
    """Draw series of (images processed, value) on one pair of axes; `y` makes the scale for all their values.

    There is at least one point. `summary` names the value that each line ends at, for those who cannot see it.
    """
    highest = max(images for one in series for images, _ in one.points)
    x_scale = images_scale(highest)
    y_scale = y([value for one in series for _, value in one.points])
    title += ", log scale" if y_scale.log else ""
    ends = "; ".join(f"{one.name} ends at {one.points[-1][1]:.4g}" for one in series if one.points)
    return Chart(
        title=title,
        summary=f"{title} by images processed: {ends}",
        x_label=f"images processed{_unit(highest)[1]}",
        x_ticks=[(_across(x_scale, value), text) for value, text in x_scale.ticks],
        y_ticks=[(_down(y_scale, value), text) for value, text in y_scale.ticks],
        lines=[_line(one, x_scale, y_scale) for one in series if one.points],
    )


def images_scale(highest: float) -> Scale:
    """Return the scale of images processed, from 0 to exactly the highest, with round ticks inside."""
    unit, step = _unit(highest)[0], nice_tick_step(highest)
    values = [step * number for number in range(math.floor(highest / step + 1e-9) + 1)]
    ticks = [(value, f"{value / unit:.10g}") for value in values]
    return Scale(0, highest, ticks)


def loss_scale(values: Sequence[float]) -> Scale:
    """Return a scale from 0 to the next round value above the highest loss; logarithmic where the losses differ a lot.

    What is below LEAST_LOSS is drawn there: a network that knows its images by heart reaches 0.
    """
    least = max(min(values), MIN_LOSS)
    if max(values) > _LOG_RATIO * least:
        return log_scale([least, max(values)])
    return _rounded(0, max(values), lambda value: f"{value:.10g}")


def percent_scale(values: Sequence[float]) -> Scale:
    """Return a scale between the round percentages around fractions."""
    return _rounded(min(values), max(values), lambda value: f"{100 * value:.10g}%")


def log_scale(values: Sequence[float]) -> Scale:
    """Return a logarithmic scale between the powers of ten around positive values."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    step = math.ceil((high - low) / _MOST_PARTS)
    ticks = [(10.0**power, _power_of_ten(power)) for power in range(low, high + 1, step)]
    return Scale(10.0**low, 10.0**high, ticks, log=True)


def nice_tick_step(span: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that cuts a span into at most _MOST_PARTS parts."""
    magnitude = 10.0 ** math.floor(math.log10(span / _MOST_PARTS))
    return next(step * magnitude for step in (1, 2, 5, 10) if span <= _MOST_PARTS * step * magnitude * (1 + 1e-9))


def _rounded(low: float, high: float, text: Callable[[float], str]) -> Scale:
    """Widen a range to round ticks at both ends; a range of nothing becomes a twentieth wide."""
    step = nice_tick_step(max(high - low, 0.05))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [(step * number, text(step * number)) for number in range(first, last + 1)]
    return Scale(ticks[0][0], ticks[-1][0], ticks)


def _unit(highest: float) -> tuple[float, str]:
    """Return the unit that ticks up to this value are counted in, and what the axis calls it."""
    unit, words = next((unit, words) for unit, words in _UNITS if highest >= unit)
    return unit or 1, words


def _power_of_ten(power: int) -> str:
    return "1" if power == 0 else f"10{str(power).translate(_SUPERSCRIPTS)}"


def _line(series: Series, x: Scale, y: Scale) -> DrawnSeries:
    places = [(_across(x, images), _down(y, value)) for images, value in series.points]
    path = " ".join(f"{across:g},{down:g}" for across, down in places)
    return DrawnSeries(series.name, series.style, path, places if len(places) <= MAX_DOTS else [])


def _across(scale: Scale, value: float) -> float:
    return round(FRAME.left + scale.share(value) * (FRAME.right - FRAME.left), 1)


def _down(scale: Scale, value: float) -> float:
    return round(FRAME.bottom - scale.share(value) * (FRAME.bottom - FRAME.top), 1)
