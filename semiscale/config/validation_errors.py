"""Format the errors of pydantic for people."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from semiscale.common.errors import did_you_mean
from semiscale.common.text import truncated_repr
from semiscale.config import resources, run_parameters

PATTERN_DESCRIPTIONS = run_parameters.PATTERN_DESCRIPTIONS | resources.PATTERN_DESCRIPTIONS
# A text that fits after "Give", by pydantic's type of error. Its fields are those of the error's context.
EXPECTED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "a number above {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "a number below {lt}",
    "finite_number": "a finite number",
    **dict.fromkeys(("int_parsing", "int_parsing_size", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "string_type": "a text, in quotes if it looks like a number",
    "string_too_short": "a text that is not empty",
    "list_type": "a list",
    "too_short": "a list with {min_length} or more entries",
    "literal_error": "{expected}",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "keys and values"),
}


def first_detail(error: ValidationError) -> ErrorDetails:
    """Return the detail that is reported: the first unknown key, or the first detail.

    A misspelt key is reported as unknown and as missing. The unknown key helps more.
    """
    return min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")


def names_at(model: type[BaseModel], path: Sequence[int | str]) -> Iterable[str]:
    """Return the keys of the section that a key is in.

    Args:
        model: Model of the whole content.
        path: Keys and positions in lists that lead to the key. The last one is the key itself.

    Returns:
        The names. They are empty if the path leads through something that is not a section.
    """
    section: Any = model
    for step in path[:-1]:
        if isinstance(step, int):
            # A position in a list, whose items have one type.
            (section,) = get_args(section) or (None,)
        elif isinstance(section, type) and issubclass(section, BaseModel) and step in section.model_fields:
            section = section.model_fields[step].annotation
        else:
            return ()
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()


def format_validation_error(error: ValidationError, valid_names: Iterable[str]) -> str:
    """Format the first error of pydantic as one line of whole sentences.

    Args:
        error: Error with one detail or more.
        valid_names: Names to propose instead of an unknown key.

    Returns:
        The path of the key, the problem with the value, and what to give instead.
    """
    detail = first_detail(error)
    path = _key_path(detail)
    if detail["type"] == "extra_forbidden":
        return f"{path}: This key is unknown{did_you_mean(str(detail['loc'][-1]), valid_names)}"
    if detail["type"] == "missing":
        return f"{path}: This key is missing and has no default. Set it."
    more = len({_key_path(other) for other in error.errors()}) - 1
    others = f" There {'is' if more == 1 else 'are'} {more} more such error{'s' * (more > 1)}." if more else ""
    return f"{path}: The value {truncated_repr(detail['input'])} is not valid{_cure(detail)}{others}"


def _key_path(detail: ErrorDetails) -> str:
    """Return the path of a key, without pydantic's names for the alternatives of its type."""
    return ".".join(step for step in map(str, detail["loc"]) if not step.startswith(("constrained-", "literal[")))


def _cure(detail: ErrorDetails) -> str:
    """Return what to give instead of a value, as the end of a sentence and another sentence."""
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in detail.get("ctx", {}).items()
    }
    if detail["type"] == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f". Give {PATTERN_DESCRIPTIONS.get(pattern, f'a text that matches the pattern {pattern}')}."
    if detail["type"] in EXPECTED:
        return f". Give {EXPECTED[detail['type']].format(**context)}."
    if detail["type"] == run_parameters.OWN_CHECK:
        return f". Give {detail['msg']}."
    return f": {detail['msg'][0].lower()}{detail['msg'][1:].rstrip('.')}. Correct it."
