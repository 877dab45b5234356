"""Tune the C library's allocator for networks that compute on a CPU."""

import ctypes

# The numbers are from malloc.h of the GNU C library. mallopt(3) describes the parameters.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def retain_freed_memory() -> None:
    """Keep the memory that this process frees for its next allocations.

    The activations of a network are hundreds of megabytes that are freed and allocated again at every step. The GNU C
    library returns blocks of that size to the system at once. The system clears every page before it hands it out
    again. That took a third of the time of a step of ResNet-50 on two cores (docs/benchmarks.md).

    All threads share one arena. In an arena of a thread, the library takes every block above 64 MB from the system.
    With another C library the function does nothing.

    Cost:
        The process never shrinks below its largest size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
