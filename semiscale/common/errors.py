"""The errors of the program, their exit codes and their stable ids.

SemiscaleError              exit 1    the run cannot go on
├── InvalidInputError       exit 2    bad input, refused before it costs anything
│   └── TooManyBadSamplesError  exit 2    more bad samples than `max_failed_fraction` allows
├── BudgetExceededError     exit 3    the device-hours of the run are used up
└── TerminatedError         exit 143  SIGTERM (signals.py)

Every error has an id such as `SEMI-E001`. `docs/errors.md` gives its cause and its cure.
"""

import difflib
import re
from collections.abc import Iterable

_ERROR_ID = re.compile(r" \[(SEMI-E\d{3})\]$")


class SemiscaleError(Exception):
    """The run cannot go on.

    Args:
        code: Stable id, such as `SEMI-E001`. `docs/errors.md` explains it. It is empty if an error is read from a
            status or a log line that has no id.
        message: One line for a person. It says what is wrong with which object or key, and what to do.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]" if self.code else self.message


class InvalidInputError(SemiscaleError):
    """The input is bad and was refused before it cost anything."""

    exit_code = 2


class TooManyBadSamplesError(InvalidInputError):
    """The share of samples that could not be read is above the stated fraction."""


class BudgetExceededError(SemiscaleError):
    """The run has used up its `budget_hours`. Finished work is kept."""

    exit_code = 3


def split_error_id(text: str) -> tuple[str, str]:
    """Return the id at the end of an error's text, and the text before it.

    Args:
        text: `str(error)`, or a line of a log that ends with it.

    Returns:
        The id, which is empty if there is none, and the text without it.
    """
    match = _ERROR_ID.search(text)
    return (match[1], text[: match.start()]) if match else ("", text)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return a hint that lists near names, or the first twenty valid names.

    Args:
        name: Name that was given.
        valid: Names that are accepted.

    Returns:
        Text such as `; did you mean 'resnet50'?`, to append to a message.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; valid: " + ", ".join(names if len(names) <= 20 else [*names[:20], "…"])
