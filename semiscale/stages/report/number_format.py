"""Format the numbers of the page: thousands separators, minus sign, readable units."""

import math
import sys
from decimal import Decimal


def number(value: int) -> str:
    """Format a count: 1,234,567."""
    return f"{value:,}"


def percent(fraction: float, decimals: int = 2) -> str:
    """Format a fraction in [0, 1]: 84.10%.

    A fraction strictly between 0 and 1 is never rounded to 0% or 100%: <0.01%, >99.99%.
    """
    text = f"{fraction:.{decimals}%}"
    least = 10.0**-decimals
    if fraction > 0 and text == f"{0:.{decimals}%}":
        return f"<{least:.{decimals}f}%"
    if fraction < 1 and text == f"{1:.{decimals}%}":
        return f">{100 - least:.{decimals}f}%"
    return text


def percentage_points(fraction: float) -> str:
    """Format a difference of two fractions, in points with its sign: +3.10, −0.40, 0.00."""
    return signed(100 * fraction)


def compare_in_words(fraction: float) -> str:
    """Format a difference of two fractions in words: 3.10 points above, 0.40 points below, equal to."""
    text = percentage_points(fraction)
    if text == "0.00":
        return "equal to"
    return f"{text[1:]} points {'above' if fraction > 0 else 'below'}"


def signed(value: float) -> str:
    """Format a number with its sign and two decimals: +3.10, −0.40, 0.00."""
    text = f"{abs(value):,.2f}"
    sign = "" if float(text.replace(",", "")) == 0 else "+" if value > 0 else "−"
    return sign + text


def probability(log_odds: float) -> str:
    """Format log-odds as a softmax probability, the sigmoid, never exactly 0 or 1."""
    # The exponent is never positive, so exp does not overflow.
    small = math.exp(-abs(log_odds))
    exact = (1 if log_odds >= 0 else small) / (1 + small)
    return percent(min(max(exact, sys.float_info.min), 1 - sys.float_info.epsilon))


def p_value(probability: float) -> str:
    """Format a p value: 0.034, <0.001."""
    return "<0.001" if probability < 0.001 else f"{probability:.2g}"


def format_learning_rate(value: float) -> str:
    """Format a learning rate in full: 0.00025."""
    return format(Decimal(repr(value)).normalize(), "f")


def duration(seconds: float) -> str:
    """Format seconds: 0.006 s, 4.2 s, 3 min 12 s, 5 h 02 min, 1,200 h 30 min."""
    if seconds < 1:
        return f"{seconds:.1g} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def size(size_bytes: int) -> str:
    """Format a size in decimal units: 812 bytes, 1.2 GB, 103.0 TB."""
    if size_bytes < 1000:
        return f"{size_bytes} bytes"
    power = min((len(str(size_bytes)) - 1) // 3, 5)
    return f"{size_bytes / 1000**power:,.1f} {'kMGTP'[power - 1]}B"
