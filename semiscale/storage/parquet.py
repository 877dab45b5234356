"""Encode Arrow tables as Parquet files and write them to any store."""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage


def write_parquet(table: pa.Table, uri: str, **options: Any) -> None:
    """Write a table as one Parquet object.

    Args:
        table: Rows of the file.
        uri: The object to write.
        options: Options of `pyarrow.parquet.ParquetWriter`, such as `compression`.
    """
    storage.write_bytes(uri, encode_parquet(table, **options))


def encode_parquet(
    rows: pa.Table | Iterable[pa.Table],
    schema: pa.Schema | None = None,
    metadata: Callable[[], Mapping[str, str | bytes]] | None = None,
    **options: Any,
) -> bytes:
    """Return the bytes of a Parquet file.

    Args:
        rows: One table, which Arrow divides into row groups, or several tables, each of which becomes one row group.
        schema: Schema of the file. It is required for several tables.
        metadata: Returns the key-value metadata of the file. It is called after the rows were encoded.
        options: Options of `pyarrow.parquet.ParquetWriter`, such as `compression`.

    Cost:
        Memory for the encoded file and for one table.
    """
    buffer = io.BytesIO()
    if schema is None and isinstance(rows, pa.Table):
        schema = rows.schema
    with pq.ParquetWriter(buffer, schema, **options) as writer:
        if isinstance(rows, pa.Table):
            writer.write_table(rows)
        else:
            for group in rows:
                writer.write_table(group, row_group_size=max(len(group), 1))
        if metadata:
            writer.add_key_value_metadata(dict(metadata()))
    return buffer.getvalue()
