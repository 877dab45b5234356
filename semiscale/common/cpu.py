"""Count the processor cores that this process may use."""

import os
from pathlib import Path

# The file holds `MICROSECONDS PERIOD`, or `max PERIOD` without a limit (cgroup-v2.rst of the Linux kernel).
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cpus(quota: Path = _QUOTA) -> int:
    """Return the number of cores that this process may use.

    A container's limit counts, not the size of its node. The kernel stops a container that has used up its limit until
    the next period begins, so more threads than that gain nothing.

    Args:
        quota: File of the control group that holds the limit. Without it, all cores of the machine count.

    Returns:
        Number of cores, at least 1.
    """
    cores = os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if limit == "max" else max(min(round(int(limit) / int(period)), cores), 1)


def intra_op_threads() -> int:
    """Return the number of threads of a network: OMP_NUM_THREADS, or else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS", available_cpus()))
