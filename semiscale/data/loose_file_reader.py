"""Read the samples of a shard of loose files.

The label of a file is the name of its folder. A file that changed after it was listed is refused.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import map_prefetched
from semiscale.data.shard import TOO_LARGE, LooseFile, Sample, Shard, is_too_large

# Files that are read at the same time. This hides a latency of 30 ms at a thousand images a second.
PREFETCH_FILES = 32

# Approximate size of the files that are read at the same time. Only a few videos fit.
PREFETCH_BYTES = 64 << 20


def iter_loose_file_samples(shard: Shard, prefetch: bool) -> Iterator[Sample]:
    """Yield the samples of loose files, in stored order.

    Args:
        shard: A shard of loose files.
        prefetch: Whether threads read the next files meanwhile.

    Raises:
        SemiscaleError: A file is gone or has changed since it was listed.

    Cost:
        Memory for one file, or for about PREFETCH_BYTES of files, but at least two, with `prefetch`.
    """
    mean_size = max(shard.size_bytes // max(len(shard.files), 1), 1)
    concurrent_reads = min(max(PREFETCH_BYTES // mean_size, 2), PREFETCH_FILES)
    contents = (
        map_prefetched(_read_listed_file, shard.files, concurrent_reads)
        if prefetch
        else map(_read_listed_file, shard.files)
    )
    for index, (file, (data, problem)) in enumerate(zip(shard.files, contents, strict=True)):
        yield Sample(index, file.name, data, file.uri, 0, PurePosixPath(file.name).parent.name or None, problem)


def _read_listed_file(file: LooseFile) -> tuple[bytes, str]:
    """Read a file in the version that was listed, and return its bytes and the problem, if any.

    A broken symbolic link is counted as a missing file.
    """
    if is_too_large(file.name, file.size_bytes):
        return b"", TOO_LARGE
    try:
        data = storage.read_bytes(file.uri, version=file.version)
    except FileNotFoundError:
        if not file.version:
            return b"", "missing file"
        raise SemiscaleError(
            "SEMI-E055", f"{file.uri}: The file is gone since it was listed. Put it back, or run the plan again."
        ) from None
    return data, "" if data else "empty file"
