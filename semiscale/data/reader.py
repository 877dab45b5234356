"""Read the samples of any shard through the reader of its format.

The order of samples is the stored one, so that (shard, index) identifies an image permanently.
"""

from collections.abc import Iterator
from itertools import islice

from semiscale import storage
from semiscale.data.loose_file_reader import iter_loose_file_samples
from semiscale.data.parquet_reader import check_columns, iter_parquet_samples, iter_row_groups, open_parquet
from semiscale.data.shard import Sample, SampleFields, Shard, open_shard
from semiscale.data.tar_reader import iter_tar_samples

_PROBED_SAMPLES = 16  # of a tar, to learn how large they are


def iter_samples(shard: Shard, columns: SampleFields, ahead: bool = False) -> Iterator[Sample]:
    """Yield a shard's samples in their stored order, streaming.

    Memory: one sample of a tar or of loose files; of a Parquet file three times a row group of up to MAX_GROUP_BYTES,
    of a larger one a few of its pages, of about a thousand images each as most programs write them. With `ahead`,
    threads fetch what comes next: READ_CHUNK_BYTES more of a tar, FILES_AHEAD files of up to BYTES_AHEAD together,
    MOST_VIDEOS_AHEAD linked videos.

    Raises FileNotFoundError where the shard is gone, InvalidInputError where it is of another format, SemiscaleError
    where it is
    damaged or is not what was listed any more; of loose files, where one of them is gone or another. An image that a
    Parquet file names by its URI is taken as it is: the shard's digest vouches for the names only.
    """
    if shard.kind == "tar":
        return iter_tar_samples(shard, columns, ahead)
    if shard.kind == "parquet":
        return iter_parquet_samples(shard, columns, ahead)
    return iter_loose_file_samples(shard, ahead)


def read_sample_bytes(uri: str, offset: int, size_bytes: int) -> bytes:
    """Read one image of a tar or a loose file by its place."""
    return storage.read_bytes(uri, offset, size_bytes)


def estimate_sample_count(shard: Shard, columns: SampleFields) -> float:
    """Estimate how many images a shard has: from its listing, from a Parquet file's footer, from a tar's first ones.

    Raises what `read` raises.
    """
    if shard.kind == "files":
        return len(shard.files)
    if shard.kind == "parquet":
        with open_shard(shard) as file:
            table = open_parquet(file, shard)
            check_columns(table.schema_arrow, columns, shard)
            return max((end for _, _, end in iter_row_groups(table, shard)), default=0)
    first = list(islice(iter_tar_samples(shard, columns), _PROBED_SAMPLES))
    end = max((sample.offset + len(sample.image) for sample in first), default=0)
    return len(first) * shard.size_bytes / max(end, 1)
