"""Read the samples of a Parquet file that holds images or links to them.

A large file is split into several shards between its row groups.
"""

import re
from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.prefetch import map_prefetched
from semiscale.data.loose_file_reader import PREFETCH_FILES
from semiscale.data.shard import MAX_IMAGE_BYTES, TOO_LARGE, Sample, SampleFields, Shard, open_shard, parse_label
from semiscale.storage.base import READ_CHUNK_BYTES

# Linked videos that are fetched at the same time. Their sizes are unknown.
PREFETCH_VIDEOS = 4

# Rows that become Python objects at the same time.
ROWS_PER_READ = 256

# A row group up to this size is fetched as a whole, and a larger one page by page.
MAX_GROUP_BYTES = 256 << 20

# Rows of a shard, unless a single row group has more. A GPU scores them in about ten minutes.
MAX_ROWS_PER_SHARD = 1 << 20

# The footer of a smaller file is not read for splitting. At five bytes a name it has at most three million rows.
MIN_SPLIT_FILE_BYTES = 16 << 20

_REMOTE_URI = re.compile("(gs|s3)://[A-Za-z0-9._-]{3,222}/.")
_BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def split_by_row_groups(shard: Shard) -> list[Shard]:
    """Split a Parquet file with many rows between its row groups.

    No part has more than MAX_ROWS_PER_SHARD rows, unless it is a single row group. Several pods can then share the
    file. The size of each part is proportional to its rows.

    Args:
        shard: A whole shard of any kind.

    Returns:
        The parts in order, or the shard itself if it is not split.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The file is not a Parquet file.
        SemiscaleError: The file has changed since it was listed.

    Cost:
        Reads the footer of a file of MIN_SPLIT_FILE_BYTES or more.
    """
    if shard.kind != "parquet" or shard.size_bytes < MIN_SPLIT_FILE_BYTES:
        return [shard]
    with open_shard(shard) as file:
        metadata = open_parquet(file, shard).metadata
    starts = [0]
    for end, next_end in pairwise(_group_ends(metadata)):
        if next_end - starts[-1] > MAX_ROWS_PER_SHARD and end > starts[-1]:
            starts.append(end)
    if len(starts) == 1:
        return [shard]
    ends = [*starts[1:], metadata.num_rows]
    return [_slice_rows(shard, start, end, metadata.num_rows) for start, end in zip(starts, ends, strict=True)]


def _group_ends(metadata: pq.FileMetaData) -> list[int]:
    return list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))


def _slice_rows(shard: Shard, start: int, end: int, total: int) -> Shard:
    size_bytes = shard.size_bytes * end // total - shard.size_bytes * start // total
    name = f"{shard.name} from row {start}"
    return shard.model_copy(update={"name": name, "size_bytes": size_bytes, "rows": (start, end)})


def read_samples_at(shard: Shard, indexes: Collection[int], columns: SampleFields) -> Iterator[Sample]:
    """Yield some samples of a Parquet file, in order.

    Args:
        shard: A Parquet file, or a part of one.
        indexes: The indexes of the samples in the shard.
        columns: The names of the columns, and whether samples are videos.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The file is not a Parquet file, or a column is missing or of another type.
        SemiscaleError: The shard is damaged, or has changed since it was listed.

    Cost:
        Reads only the row groups that contain one of the samples. Memory is that of `reader.iter_samples`.
    """
    wanted = set(indexes)
    with open_shard(shard) as file:
        table = open_parquet(file, shard)
        check_columns(table.schema_arrow, columns, shard)
        for group, start, end in iter_row_groups(table, shard):
            if wanted.isdisjoint(range(start, end)):
                continue
            for index, row in enumerate(_iter_rows(table, columns, shard, [group]), start):
                if index in wanted:
                    yield _parquet_sample(index, row, shard, columns)


def iter_parquet_samples(shard: Shard, columns: SampleFields, prefetch: bool) -> Iterator[Sample]:
    """Yield the samples of a Parquet file, or of a part of one, in stored order.

    Args:
        shard: A Parquet file, or a part of one.
        columns: The names of the columns, and whether samples are videos.
        prefetch: Whether threads read linked files meanwhile. Images inside the file are not affected.

    Raises:
        FileNotFoundError: The shard is gone.
        InvalidInputError: The file is not a Parquet file, or a column is missing or of another type.
        SemiscaleError: The shard is damaged, or has changed since it was listed.
    """
    with open_shard(shard) as file:
        table = open_parquet(file, shard)
        check_columns(table.schema_arrow, columns, shard)
        rows = enumerate(_iter_rows(table, columns, shard, [group for group, _, _ in iter_row_groups(table, shard)]))
        concurrent_reads = PREFETCH_VIDEOS if columns.videos else PREFETCH_FILES
        if prefetch and _may_hold_links(table.schema_arrow.field(columns.image).type):
            yield from map_prefetched(lambda row: _parquet_sample(*row, shard, columns), rows, concurrent_reads)
        else:
            yield from (_parquet_sample(index, row, shard, columns) for index, row in rows)


def open_parquet(file: BinaryIO, shard: Shard) -> pq.ParquetFile:
    """Open a Parquet file and choose how its row groups are fetched.

    Args:
        file: The opened shard.
        shard: The shard, for messages.

    Raises:
        InvalidInputError: The file is not a Parquet file.

    Cost:
        Memory for a row group of up to MAX_GROUP_BYTES, or for a few pages of a larger one.
    """
    # pandas and other writers may put all images into one row group of gigabytes, which is read page by page. A small
    # row group is fetched as a whole, because each of its columns would otherwise cost a request.
    try:
        table = pq.ParquetFile(file)
        groups = list(map(table.metadata.row_group, range(table.num_row_groups)))
        if sum(group.num_rows for group in groups) != table.metadata.num_rows:
            raise pa.ArrowInvalid("the row groups and the footer disagree on the number of rows")
        if max((group.total_byte_size for group in groups), default=0) <= MAX_GROUP_BYTES:
            return table
        return pq.ParquetFile(file, metadata=table.metadata, pre_buffer=False, buffer_size=READ_CHUNK_BYTES)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            "SEMI-E056", f"{shard.uri}: This is not a Parquet file: {_first_line(error)}. Write it again."
        ) from None


def check_columns(schema: pa.Schema, columns: SampleFields, shard: Shard) -> None:
    """Check the columns that are read.

    Args:
        schema: The schema of the file.
        columns: The names of the columns.
        shard: The shard, for messages.

    Raises:
        InvalidInputError: A column is missing or repeated, or the image column cannot hold images.
    """
    for option, name in (("image_column", columns.image), ("label_column", columns.label)):
        if name and name not in schema.names:
            raise InvalidInputError(
                "SEMI-E058",
                f"{shard.uri}: There is no column {name!r}. Set {option} to one of {', '.join(schema.names)}.",
            )
    for name in (columns.image, columns.label, "key"):
        if schema.names.count(name) > 1:
            raise InvalidInputError(
                "SEMI-E059", f"{shard.uri}: There are several columns {name!r}. Write the file again with one."
            )
    kind = schema.field(columns.image).type
    if not _holds_images(kind):
        raise InvalidInputError(
            "SEMI-E060",
            f"{shard.uri}: Column {columns.image!r} holds {kind}. Store bytes, URIs or {{bytes, path}} in it.",
        )


def _holds_images(kind: pa.DataType) -> bool:
    """Return whether a type is bytes, text, or a pair {bytes, path}.

    Hugging Face datasets write such pairs.
    """
    if pa.types.is_struct(kind):
        pair = [field for field in kind if field.name in ("bytes", "path")]
        return bool(pair) and all(pa.types.is_null(field.type) or _holds_images(field.type) for field in pair)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_type(kind) for is_type in (*_BYTES_TYPES, *_TEXT_TYPES))


def _may_hold_links(kind: pa.DataType) -> bool:
    return not any(is_type(kind) for is_type in _BYTES_TYPES)


def iter_row_groups(table: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Yield the row groups of a shard with their row ranges.

    Args:
        table: The opened file.
        shard: The file, or a part of it.

    Yields:
        The number of the row group in the file, its first row, and the row after its last one. Rows are counted from
        the first row of the shard.
    """
    shard_start, shard_end = shard.rows or (0, table.metadata.num_rows)
    for group, (start, end) in enumerate(pairwise([0, *_group_ends(table.metadata)])):
        if shard_start <= start and end <= shard_end:
            yield group, start - shard_start, end - shard_start


def _iter_rows(
    table: pq.ParquetFile, columns: SampleFields, shard: Shard, groups: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some row groups."""
    wanted = [name for name in table.schema_arrow.names if name in (columns.image, columns.label, "key")]
    try:
        for batch in table.iter_batches(ROWS_PER_READ, row_groups=groups, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SemiscaleError(
            "SEMI-E057", f"{shard.uri}: The Parquet file is damaged: {_first_line(error)}. Write it again."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _parquet_sample(index: int, row: dict[str, Any], shard: Shard, columns: SampleFields) -> Sample:
    image, label = row[columns.image], parse_label(row.get(columns.label))
    key = row.get("key")
    if isinstance(key, bytes):
        key = key.decode("utf-8", "replace")
    key = str((shard.rows or (0, 0))[0] + index) if key is None else str(key)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        return _linked_sample(index, key, image, label, shard, columns.videos)
    return Sample(index, key, image or b"", shard.uri, -1, label, "" if image else "empty image")


def _linked_sample(index: int, key: str, link: str, label: str | None, shard: Shard, video: bool) -> Sample:
    """Read an image that a Parquet file links.

    The link is a URI, or a path relative to the folder of the Parquet file.
    """
    is_absolute = "://" in link or link.startswith("/")
    uri = link if is_absolute else storage.join(shard.uri.rpartition("/")[0], link)
    try:
        _check_object_name(uri)
        data, problem = _read_linked_file(uri, None if video else MAX_IMAGE_BYTES)
    except (InvalidInputError, ValueError):
        data, problem = b"", "not a URI of gs://, s3:// or file://"
    return Sample(index, key, data, uri, 0, label, problem)


def _check_object_name(uri: str) -> None:
    """Raise InvalidInputError if no object of a store can have this name.

    A store answers a request for such a name with an error that it also uses for other causes. The rules are those of
    https://cloud.google.com/storage/docs/objects#naming and https://cloud.google.com/storage/docs/buckets#naming. The
    rules of S3 are narrower.
    """
    if storage.is_object_store(uri) and not (_REMOTE_URI.match(uri) and len(uri.split("/", 3)[3].encode()) <= 1024):
        raise InvalidInputError(
            "SEMI-E061", f"{uri}: This is not the name of an object. Write a URI such as gs://bucket/name."
        )


def _read_linked_file(uri: str, limit: int | None) -> tuple[bytes, str]:
    """Read a linked file of unknown size, and return its bytes and the problem, if any.

    At most one byte beyond the limit is read.
    """
    try:
        data = storage.read_bytes(uri, 0, None if limit is None else limit + 1)
    except FileNotFoundError:
        return b"", "missing file"
    if limit is not None and len(data) > limit:
        return b"", TOO_LARGE
    return data, "" if data else "empty file"
