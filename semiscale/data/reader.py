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

# Samples of a tar whose sizes are used to estimate the number of all.
_PROBED_SAMPLES = 16


def iter_samples(shard: Shard, columns: SampleFields, prefetch: bool = False) -> Iterator[Sample]:
    """Yield a shard's samples in their stored order, streaming.

    An image that a Parquet file names by its URI is read as it is, because the shard's digest identifies the names
    alone.

    Args:
        shard: The shard.
        columns: The names of the columns or keys, and whether samples are videos.
        prefetch: Whether threads fetch the next data meanwhile. They fetch READ_CHUNK_BYTES of a tar, PREFETCH_FILES
            files of up to PREFETCH_BYTES together, or PREFETCH_VIDEOS linked videos.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The shard has another format.
        SemiscaleError: The shard, or one of its loose files, is damaged, gone, or has changed since it was listed.

    Cost:
        Memory for one sample of a tar or of loose files. For a Parquet file, three times a row group of up to
        MAX_GROUP_BYTES. A larger row group is read a few pages at a time, about a thousand images each.
    """
    if shard.kind == "tar":
        return iter_tar_samples(shard, columns, prefetch)
    if shard.kind == "parquet":
        return iter_parquet_samples(shard, columns, prefetch)
    return iter_loose_file_samples(shard, prefetch)


def read_sample_bytes(uri: str, offset: int, size_bytes: int) -> bytes:
    """Read one image of a tar, or one loose file, by its byte range.

    Args:
        uri: The tar or the loose file.
        offset: The position of the first byte.
        size_bytes: The number of bytes.

    Raises:
        FileNotFoundError: The object is gone.
    """
    return storage.read_bytes(uri, offset, size_bytes)


def estimate_sample_count(shard: Shard, columns: SampleFields) -> float:
    """Return the approximate number of samples of a shard.

    It is exact for loose files and Parquet files. For a tar it is estimated from the sizes of the first samples.

    Args:
        shard: The shard.
        columns: The names of the columns or keys, and whether samples are videos.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The shard has another format.
        SemiscaleError: The shard is damaged, or has changed since it was listed.

    Cost:
        Reads the footer of a Parquet file, or the first 16 samples of a tar.
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
