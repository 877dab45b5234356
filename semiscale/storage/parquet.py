"""Encode Arrow tables as Parquet files and write them to any store."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage


def write_parquet(table: pa.Table, uri: str, **options: Any) -> None:
    """Write a table as one Parquet object.

    Args:
        table: Rows of the file.
        uri: Place of the object.
        options: Options of `pyarrow.parquet.ParquetWriter`, such as `compression`.
    """
    storage.write_bytes(uri, encode_parquet(table, **options))


def encode_parquet(
    rows: pa.Table | Sequence[pa.Table],
    schema: pa.Schema | None = None,
    metadata: Callable[[], Mapping[str, str]] | None = None,
    **options: Any,
) -> bytes:
    """Return the bytes of a Parquet file.

    Args:
        rows: One table, which Arrow cuts into row groups, or a list of tables, which become one row group each.
        schema: Schema of the file. A list of tables needs it.
        metadata: Returns the key-value metadata of the file. It is called after the rows were encoded.
        options: Options of `pyarrow.parquet.ParquetWriter`, such as `compression`.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, rows.schema if schema is None else schema, **options) as writer:
        if isinstance(rows, pa.Table):
            writer.write_table(rows)
        else:
            for group in rows:
                writer.write_table(group, row_group_size=max(len(group), 1))
        if metadata:
            writer.add_key_value_metadata(dict(metadata()))
    return buffer.getvalue()
