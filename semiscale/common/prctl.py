"""Settings of this process that Linux offers by prctl(2).

Other systems have no prctl(2). The functions do nothing there.
"""

import ctypes

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def set_parent_death_signal(number: int) -> None:
    """Ask for a signal to this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Become the parent of all descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(option, value)
