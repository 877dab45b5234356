"""Read the samples of a shard of loose files.

The label of a file is the name of its folder. A file that changed after it was listed is refused.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import map_prefetched
from semiscale.data.shard import TOO_LARGE, LooseFile, Sample, Shard, is_too_large

PREFETCH_FILES = 32  # loose or linked files read at once: hides 30 ms of latency from a thousand images a second


PREFETCH_BYTES = 64 << 20  # of loose files read at once, about: videos are few at a time


def iter_loose_file_samples(shard: Shard, ahead: bool) -> Iterator[Sample]:
    """A file's label is its folder's name; the unlabeled side does not look at it."""
    each = max(shard.size_bytes // max(len(shard.files), 1), 1)
    at_once = min(max(PREFETCH_BYTES // each, 2), PREFETCH_FILES)
    contents = map_prefetched(_read_listed_file, shard.files, at_once) if ahead else map(_read_listed_file, shard.files)
    for index, (file, (data, problem)) in enumerate(zip(shard.files, contents, strict=True)):
        yield Sample(index, file.name, data, file.uri, 0, PurePosixPath(file.name).parent.name or None, problem)


def _read_listed_file(file: LooseFile) -> tuple[bytes, str]:
    """Read a file that the digest of its shard vouches for: no other than was listed. A link to nothing is counted."""
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
