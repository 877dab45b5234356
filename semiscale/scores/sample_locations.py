"""Where the samples of one unit lie: key, URI, byte range. Those that are likely to win stand in front.

Two files a unit. `places.parquet` has the samples of the first bands of its scores, one row group a band, so that a
selection that needed so many bands finds its winners by reading as many row groups; `samples.parquet` has all of the
unit's samples in order, for a larger K and for removal lists. Without the first, naming sixteen million winners would
mean reading the keys of a billion images.
"""

import io
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.scores.score_file import U64, BandedRows
from semiscale.storage.parquet import encode_parquet
from semiscale.storage.parquet_row_groups import RowGroupReader, corrupt_file_error, reraise_as_corrupt

ROWS_AT_ONCE = 1 << 18  # of a unit's samples
LOCATED_BANDS = 3  # with the doubling of the bands, 1.75 times the ranks that band 0 was made to hold
_UNIT = "semiscale.unit"
SCHEMA = pa.schema(
    [
        ("sample", pa.uint64()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
    ]
)


def write_locations(samples: pa.Table, unit: BandedRows, identity: str) -> tuple[bytes, bytes]:
    """Return the places file and the samples file of a unit, whose samples come in order of their codes.

    Codes are counted within the unit and would fit any other: so its `identity`, its digest, is in both files.
    """
    codes = samples["sample"].to_numpy()
    ends = np.searchsorted(unit.band, np.arange(LOCATED_BANDS), side="right")
    groups: list[U64] = []
    for start, end in pairwise([0, *ends.tolist()]):
        earlier = np.concatenate([np.empty(0, np.uint64), *groups])
        groups.append(np.setdiff1d(unit.rows.sample[start:end], earlier))
    placed = [samples.take(pa.array(np.searchsorted(codes, group))) for group in groups]
    return _written(placed, identity), _written([samples], identity)


def _written(groups: list[pa.Table], identity: str) -> bytes:
    """Write one row group a table. Codes and offsets ascend, keys resemble their neighbours: 10 to 20 bytes a row."""
    ascending = {"sample": "DELTA_BINARY_PACKED", "offset": "DELTA_BINARY_PACKED", "size_bytes": "DELTA_BINARY_PACKED"}
    return encode_parquet(
        (group.cast(SCHEMA) for group in groups if len(group)),
        SCHEMA,
        lambda: {_UNIT: identity},
        compression="zstd",
        use_dictionary=["uri"],
        column_encoding={**ascending, "key": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
        store_schema=False,
    )


def locate_samples(unit: ShardGroupReceipt, codes: U64) -> tuple[pa.Table, int]:
    """Return the rows of these samples, in their order, and how many bytes were read for it.

    Reads the places band by band until all are found, and the whole of the samples where they are not: so a row that
    the places lack costs time, and one that the samples lack is refused.
    """
    groups = RowGroupReader(unit.places)
    _refuse_other_unit(unit, unit.places, groups.metadata)
    found = SCHEMA.empty_table()
    for number in range(groups.metadata.num_row_groups):
        if np.isin(codes, found["sample"].to_numpy()).all():
            break
        found = pa.concat_tables([found, groups.read(number, SCHEMA.names)])
    if np.isin(codes, found["sample"].to_numpy()).all():
        return _in_order(found, codes), groups.bytes_read
    batches, bytes_read = iter_samples(unit, SCHEMA.names)
    return _in_order(pa.Table.from_batches(batches, SCHEMA), codes), groups.bytes_read + bytes_read


def iter_samples(unit: ShardGroupReceipt, columns: list[str]) -> tuple[Iterator[pa.RecordBatch], int]:
    """Return all of a unit's samples, a little at a time, and the size of their file.

    Raises SemiscaleError where it is gone, damaged or another unit's, or has not one row a scored image.
    """
    data = storage.read_or_none(unit.samples)
    if data is None:
        raise corrupt_file_error(unit.samples, "no such file")
    with reraise_as_corrupt(unit.samples):
        file = pq.ParquetFile(io.BytesIO(data))
    _refuse_other_unit(unit, unit.samples, file.metadata)
    if file.metadata.num_rows != unit.scored:
        raise corrupt_file_error(
            unit.samples, f"{file.metadata.num_rows:,} rows; expected one for each of {unit.scored:,} images"
        )
    return _batches(unit.samples, file, columns), len(data)


def _refuse_other_unit(unit: ShardGroupReceipt, uri: str, metadata: pq.FileMetaData) -> None:
    identity = (metadata.metadata or {}).get(_UNIT.encode(), b"").decode()
    if identity != unit.digest:
        raise corrupt_file_error(uri, f"of unit {identity or 'unknown'}; expected {unit.digest}")


def _batches(uri: str, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with reraise_as_corrupt(uri):
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns)


def _in_order(table: pa.Table, codes: U64) -> pa.Table:
    known = table["sample"].to_numpy()
    order = np.argsort(known)
    return table.take(pa.array(order[np.searchsorted(known, codes, sorter=order)]))
