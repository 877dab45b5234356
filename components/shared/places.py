"""Where the samples of one unit lie: key, URI, byte range. Those that are likely to win stand in front.

Two files a unit. `places.parquet` has the samples of the first bands of its scores, one row group a band, so that a
selection that needed so many bands finds its winners by reading as many row groups; `samples.parquet` has all of the
unit's samples in order, for a larger K and for removal lists. Without the first, naming sixteen million winners would
mean reading the keys of a billion images.
"""

import io
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.shared import storage
from components.shared.bands import RowGroups
from components.shared.scores import U64, Banded

PLACED_BANDS = 3  # with the doubling of the bands, 1.75 times the ranks that band 0 was made to hold
SCHEMA = pa.schema(
    [
        ("sample", pa.uint64()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("size_bytes", pa.int64()),
    ]
)


def encode(samples: pa.Table, unit: Banded) -> tuple[bytes, bytes]:
    """Return the places file and the samples file of a unit, whose samples come in order of their codes."""
    codes = samples["sample"].to_numpy()
    ends = np.searchsorted(unit.band, np.arange(PLACED_BANDS), side="right")
    groups: list[U64] = []
    for start, end in pairwise([0, *ends.tolist()]):
        earlier = np.concatenate([np.empty(0, np.uint64), *groups])
        groups.append(np.setdiff1d(unit.rows.sample[start:end], earlier))
    placed = [samples.take(pa.array(np.searchsorted(codes, group))) for group in groups]
    return _written(placed), _written([samples])


def _written(groups: list[pa.Table]) -> bytes:
    """Write one row group a table. Codes and offsets ascend, keys resemble their neighbours: 10 to 20 bytes a row."""
    ascending = {"sample": "DELTA_BINARY_PACKED", "offset": "DELTA_BINARY_PACKED", "size_bytes": "DELTA_BINARY_PACKED"}
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        SCHEMA,
        compression="zstd",
        use_dictionary=["uri"],
        column_encoding={**ascending, "key": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
        store_schema=False,
    ) as writer:
        for group in groups:
            if len(group):
                writer.write_table(group.cast(SCHEMA), row_group_size=len(group))
    return buffer.getvalue()


def find(places: str, samples: str, codes: U64) -> tuple[pa.Table, int]:
    """Return the rows of these samples, in their order, and how many bytes were read for it.

    Reads the places band by band until all are found, and the whole of the samples where they are not.
    """
    groups = RowGroups(places)
    found = SCHEMA.empty_table()
    for number in range(groups.metadata.num_row_groups):
        if np.isin(codes, found["sample"].to_numpy()).all():
            break
        found = pa.concat_tables([found, groups.read(number, SCHEMA.names)])
    if np.isin(codes, found["sample"].to_numpy()).all():
        return _in_order(found, codes), groups.bytes_read
    data = storage.read(samples)
    return _in_order(pq.read_table(io.BytesIO(data)), codes), groups.bytes_read + len(data)


def _in_order(table: pa.Table, codes: U64) -> pa.Table:
    known = table["sample"].to_numpy()
    order = np.argsort(known)
    return table.take(pa.array(order[np.searchsorted(known, codes, sorter=order)]))
