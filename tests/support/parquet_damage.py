"""Damage Parquet files in the ways that tests of the scan's files need."""

from pathlib import Path

import pyarrow.parquet as pq


def truncate_rows(path: Path, rows: int) -> None:
    """Write a Parquet file again with the same footer metadata and fewer rows."""
    file = pq.ParquetFile(path)
    table = file.read().slice(0, rows)
    metadata = {name.decode(): value.decode() for name, value in file.metadata.metadata.items()}
    with pq.ParquetWriter(path, table.schema.remove_metadata(), store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)


def damage(path: Path, how: str) -> None:
    """Delete, truncate or overwrite a file, or give it another identity.

    Args:
        path: A file of a shard group.
        how: "gone", "empty", "cut off", "rows lost" or "overwritten". Any other value changes the identity from u to v.
    """
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "rows lost":
        truncate_rows(path, 10)
    elif how == "overwritten":
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    else:
        path.write_bytes(data.replace(b"semiscale.unit\x18\x01u", b"semiscale.unit\x18\x01v"))
