"""Tune the C library's allocator for networks that compute on a CPU."""

import ctypes

# malloc.h of the GNU C library; the parameters are described in mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def retain_freed_memory() -> None:
    """Keep what this process frees for its next allocations, from now on, instead of giving it back to the system.

    The activations of a network are hundreds of megabytes that are freed and allocated again at every step. The GNU C
    library gives blocks of that size back at once, and the system hands them out page by page, cleared: a third of the
    time of a step of ResNet-50 on two cores (benchmarks/README.md). All threads share one arena, for in those of their
    own the library takes no block above 64 MB but from the system. Cost: the process stays as large as it once was.
    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
