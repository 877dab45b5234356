"""Define the errors of the program, their exit codes and their stable ids.

SemiscaleError              exit 1    the run cannot continue
├── InvalidInputError       exit 2    bad input, refused before any work is done
│   └── TooManyBadSamplesError  exit 2    more bad samples than `max_failed_fraction` allows
├── BudgetExceededError     exit 3    the device-hours of the run are used up
├── AbandonedError          exit 4    nobody follows the Job of this pod any more
└── TerminatedError         exit 143  SIGTERM (signals.py)

Every error has an id such as `SEMI-E001`. `docs/errors.md` gives its cause and its cure.
"""

import difflib
import re
from collections.abc import Iterable

_ERROR_ID = re.compile(r" \[(SEMI-E\d{3})\]$")


class SemiscaleError(Exception):
    """The run cannot continue.

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
    """The input is bad, and was refused before any work was done."""

    exit_code = 2


class TooManyBadSamplesError(InvalidInputError):
    """The share of samples that cannot be read is above `max_failed_fraction`."""


class BudgetExceededError(SemiscaleError):
    """The run has used up its `budget_hours`. Finished work is kept."""

    exit_code = 3


class AbandonedError(SemiscaleError):
    """No task follows the Job of this pod any more, or its run was cancelled. Finished work is kept."""

    exit_code = 4


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
    """Return a hint that lists similar names, or the first twenty valid names.

    Args:
        name: Name that is not valid.
        valid: Names that are accepted.

    Returns:
        A sentence such as `. Did you mean 'resnet50'?`, to append to a message. It is a full stop without valid names.
    """
    names = sorted(valid)
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if similar:
        return ". Did you mean " + " or ".join(map(repr, similar)) + "?"
    if not names:
        return "."
    return ". Valid names are " + ", ".join(names if len(names) <= 20 else [*names[:20], "…"]) + "."
