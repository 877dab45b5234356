"""Count the processor cores that this process may use."""

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # `MICROSECONDS PERIOD`, or `max PERIOD` (the kernel's cgroup-v2.rst)


def available_cpus(quota: Path = _QUOTA) -> int:
    """Return how many cores may be used: those of the machine, or what the container's limit leaves of them.

    More threads than that would be stopped for the rest of every period as soon as the limit is used up.
    """
    there = os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
    except (OSError, ValueError):
        return there
    return there if most == "max" else max(min(round(int(most) / int(period)), there), 1)


def intra_op_threads() -> int:
    """Return how many threads a network may compute on: OMP_NUM_THREADS where it is set, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS", available_cpus()))
