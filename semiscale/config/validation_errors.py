"""Format the errors of pydantic for people."""

from collections.abc import Iterable

from pydantic import ValidationError

from semiscale.common.errors import did_you_mean
from semiscale.common.text import truncated_repr


def format_validation_error(error: ValidationError, valid_names: Iterable[str]) -> str:
    """Format the first error of pydantic as one line.

    Args:
        error: Error with one detail or more.
        valid_names: Names to propose instead of an unknown key.

    Returns:
        The path of the key, the problem and the value.
    """
    # A misspelt key is reported as unknown and as missing. The unknown key helps more.
    first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key{did_you_mean(str(first['loc'][-1]), valid_names)}"
    if first["type"] == "missing":
        return f"{path}: missing; it has no default"
    more = len(error.errors()) - 1
    others = f" (and {more} more)" if more else ""
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}; found {truncated_repr(first['input'])}{others}"
