"""Format the errors of pydantic for people."""

from collections.abc import Iterable

from pydantic import ValidationError

from semiscale.common.errors import did_you_mean
from semiscale.common.text import truncated_repr


def format_validation_error(error: ValidationError, valid_names: Iterable[str]) -> str:
    """Put pydantic's first complaint in one line: the key's path, what is wrong, what was found."""
    # A misspelt key may also be a missing one: the key that was written says more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key{did_you_mean(str(first['loc'][-1]), valid_names)}"
    if first["type"] == "missing":
        return f"{path}: missing; it has no default"
    more = len(error.errors()) - 1
    others = f" (and {more} more)" if more else ""
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}; found {truncated_repr(first['input'])}{others}"
