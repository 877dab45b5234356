"""Read the samples of a Parquet file that holds images or links to them.

A large file is cut into shards between its row groups.
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

PREFETCH_VIDEOS = 4  # that a Parquet file links: how large they are is not known


ROWS_PER_READ = 256  # of a Parquet file: what is Python objects at a time


MAX_GROUP_BYTES = 256 << 20  # of a Parquet file's row group that is fetched whole; a larger one comes page by page


MAX_ROWS_PER_SHARD = 1 << 20  # of a Parquet file to a shard, but for one row group: ten minutes of a GPU's scanning


MIN_SPLIT_FILE_BYTES = 16 << 20  # a smaller Parquet file is not asked for its rows: at five bytes a name, three million


_REMOTE_URI = re.compile("(gs|s3)://[A-Za-z0-9._-]{3,222}/.")


_BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def split_by_row_groups(shard: Shard) -> list[Shard]:
    """Cut a Parquet file of many rows between its row groups, so that no pod holds more than MAX_ROWS or one group of
    it, and several share it; any other shard is its only slice. Reads the footer. Raises what `read` raises.

    Each has its part of the bytes, by its rows.
    """
    if shard.kind != "parquet" or shard.size_bytes < MIN_SPLIT_FILE_BYTES:
        return [shard]
    with open_shard(shard) as file:
        metadata = open_parquet(file, shard).metadata
    cuts = [0]
    for end, with_next in pairwise(_group_ends(metadata)):
        if with_next - cuts[-1] > MAX_ROWS_PER_SHARD and end > cuts[-1]:
            cuts.append(end)
    ends = [*cuts[1:], metadata.num_rows]
    return [_slice_rows(shard, *rows, of=ends[-1]) for rows in zip(cuts, ends, strict=True)] if cuts[1:] else [shard]


def _group_ends(metadata: pq.FileMetaData) -> list[int]:
    return list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))


def _slice_rows(shard: Shard, start: int, end: int, of: int) -> Shard:
    size_bytes = shard.size_bytes * end // of - shard.size_bytes * start // of
    name = f"{shard.name} from row {start}"
    return shard.model_copy(update={"name": name, "size_bytes": size_bytes, "rows": (start, end)})


def read_samples_at(shard: Shard, indexes: Collection[int], columns: SampleFields) -> Iterator[Sample]:
    """Yield some samples of a Parquet file, in order; of its row groups, only those that hold one are read.

    Memory: as `read`. Raises what `read` raises.
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
    """Yield the samples of a Parquet file, or of some of its row groups, in their stored order."""
    with open_shard(shard) as file:
        table = open_parquet(file, shard)
        check_columns(table.schema_arrow, columns, shard)
        rows = enumerate(_iter_rows(table, columns, shard, [group for group, _, _ in iter_row_groups(table, shard)]))
        at_once = PREFETCH_VIDEOS if columns.videos else PREFETCH_FILES
        if prefetch and _may_hold_links(table.schema_arrow.field(columns.image).type):
            yield from map_prefetched(lambda row: _parquet_sample(*row, shard, columns), rows, at_once)
        else:
            yield from (_parquet_sample(index, row, shard, columns) for index, row in rows)


def open_parquet(file: BinaryIO, shard: Shard) -> pq.ParquetFile:
    """Open a Parquet file. pandas and others put all of a file's images into one row group, which may be gigabytes;
    small ones are fetched whole, because page by page each of their columns would cost a request of its own.
    """
    try:
        table = pq.ParquetFile(file)
        groups = list(map(table.metadata.row_group, range(table.num_row_groups)))
        if sum(group.num_rows for group in groups) != table.metadata.num_rows:
            raise pa.ArrowInvalid("its row groups have not the rows that its footer says")
        if max((group.total_byte_size for group in groups), default=0) <= MAX_GROUP_BYTES:
            return table
        return pq.ParquetFile(file, metadata=table.metadata, pre_buffer=False, buffer_size=READ_CHUNK_BYTES)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            "SEMI-E056", f"{shard.uri}: This is not a Parquet file: {_first_line(error)}. Write it again."
        ) from None


def check_columns(schema: pa.Schema, columns: SampleFields, shard: Shard) -> None:
    """Raise InvalidInputError if a column is missing, is there twice, or cannot hold images."""
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
    """Say whether a column's type is bytes, a URI, or the {bytes, path} pair that Hugging Face datasets write."""
    if pa.types.is_struct(kind):
        pair = [field for field in kind if field.name in ("bytes", "path")]
        return bool(pair) and all(pa.types.is_null(field.type) or _holds_images(field.type) for field in pair)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (*_BYTES_TYPES, *_TEXT_TYPES))


def _may_hold_links(kind: pa.DataType) -> bool:
    return not any(test(kind) for test in _BYTES_TYPES)


def iter_row_groups(table: pq.ParquetFile, shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Yield the row groups of a shard, each with its first row and the one after its last, counted within it."""
    first, after = shard.rows or (0, table.metadata.num_rows)
    for group, (start, end) in enumerate(pairwise([0, *_group_ends(table.metadata)])):
        if first <= start and end <= after:
            yield group, start - first, end - first


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
    """Read an image that a Parquet file names: by its URI, or by a path relative to the Parquet file's folder."""
    absolute = "://" in link or link.startswith("/")
    uri = link if absolute else storage.join(shard.uri.rpartition("/")[0], link)
    try:
        _check_object_name(uri)
        data, problem = _read_linked_file(uri, None if video else MAX_IMAGE_BYTES)
    except (InvalidInputError, ValueError):
        data, problem = b"", "not a URI of gs://, s3:// or file://"
    return Sample(index, key, data, uri, 0, label, problem)


def _check_object_name(uri: str) -> None:
    """Raise InvalidInputError for what no object can be called: a store answers an error to it that does not tell it
    from others,
    https://cloud.google.com/storage/docs/objects#naming, .../buckets#naming; S3's rules are narrower.
    """
    if storage.is_object_store(uri) and not (_REMOTE_URI.match(uri) and len(uri.split("/", 3)[3].encode()) <= 1024):
        raise InvalidInputError(
            "SEMI-E061", f"{uri}: This is not the name of an object. Write a URI such as gs://bucket/name."
        )


def _read_linked_file(uri: str, limit: int | None) -> tuple[bytes, str]:
    """Read a file of which nothing is known: of one that is too large, the bytes that tell."""
    try:
        data = storage.read_bytes(uri, 0, None if limit is None else limit + 1)
    except FileNotFoundError:
        return b"", "missing file"
    too_large = limit is not None and len(data) > limit
    return (b"", TOO_LARGE) if too_large else (data, "" if data else "empty file")
