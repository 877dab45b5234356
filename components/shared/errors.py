"""What can go wrong, and the exit code that says so.

SemiscaleError          exit 1   the run cannot go on: a hole in the ledger, a store that does not answer
├── Refused             exit 2   bad input: one line says what, where, what was expected, what to do
│   └── TooManyFailures exit 2   more bad samples than `max_failed_fraction` allows
├── BudgetSpent         exit 3   the run's device-hours are used up
└── Stopped             exit 143 told to stop (stopping.py); what was finished is kept
"""

import difflib
from collections.abc import Iterable


class SemiscaleError(Exception):
    """The run cannot go on. The message is one line for a person."""

    exit_code = 1


class Refused(SemiscaleError):
    """The input is bad and was refused before it cost anything."""

    exit_code = 2


class TooManyFailures(Refused):
    """The share of samples that could not be read is above the stated fraction."""


class BudgetSpent(SemiscaleError):
    """The run has used up its `budget_hours` and stopped; what was finished is kept."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'resnet50'?`, or the first twenty valid names where none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; valid: " + ", ".join(names if len(names) <= 20 else [*names[:20], "…"])
