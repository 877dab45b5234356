"""Write and read the locations of samples: key, URI and byte range.

Each shard group has two files. `places.parquet` has the samples of the first bands of the score file, with one row
group per band. A selection that needs three bands finds its winners in three row groups. `samples.parquet` has all
samples of the shard group in order of their codes. It serves a larger K and removal lists. Without the first file, a
merge would read the keys of a billion images to find sixteen million winners.
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

# Rows of a samples file that are in memory at the same time.
ROWS_AT_ONCE = 1 << 18
# Bands whose samples are in the places file. They hold 1.75 times the ranks of band 0.
LOCATED_BANDS = 3
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


def write_locations(samples: pa.Table, banded: BandedRows, identity: str) -> tuple[bytes, bytes]:
    """Return the places file and the samples file of a shard group.

    Args:
        samples: The samples of the shard group in order of their codes, with the columns of SCHEMA.
        banded: The rows of the score file.
        identity: The digest of the shard group. It is stored in both files, because codes are counted within the shard
            group and would fit any other one.

    Cost:
        Memory for the files, 10 to 20 bytes a sample.
    """
    codes = samples["sample"].to_numpy()
    ends = np.searchsorted(banded.band, np.arange(LOCATED_BANDS), side="right")
    groups: list[U64] = []
    for start, end in pairwise([0, *ends.tolist()]):
        earlier = np.concatenate([np.empty(0, np.uint64), *groups])
        groups.append(np.setdiff1d(banded.rows.sample[start:end], earlier))
    places = [samples.take(pa.array(np.searchsorted(codes, group))) for group in groups]
    return _encode(places, identity), _encode([samples], identity)


def _encode(groups: list[pa.Table], identity: str) -> bytes:
    """Return a Parquet file with one row group per table, of 10 to 20 bytes a row.

    The delta encodings fit, because codes and offsets ascend and keys resemble their neighbours.
    """
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


def locate_samples(receipt: ShardGroupReceipt, codes: U64) -> tuple[pa.Table, int]:
    """Return the locations of some samples of a shard group.

    Args:
        receipt: The receipt of the shard group.
        codes: The codes of the samples.

    Returns:
        A table with the columns of SCHEMA, in order of `codes`, and the number of bytes read.

    Raises:
        SemiscaleError: A file is missing, damaged, or of another shard group.

    Cost:
        Reads the places file band by band until all samples are located. The whole samples file is read only if a
        sample is not in the places file.
    """
    groups = RowGroupReader(receipt.places)
    _check_identity(receipt, receipt.places, groups.metadata)
    locations = SCHEMA.empty_table()
    for number in range(groups.metadata.num_row_groups):
        if np.isin(codes, locations["sample"].to_numpy()).all():
            break
        locations = pa.concat_tables([locations, groups.read(number, SCHEMA.names)])
    if np.isin(codes, locations["sample"].to_numpy()).all():
        return _select_in_order(locations, codes), groups.bytes_read
    batches, bytes_read = iter_samples(receipt, SCHEMA.names)
    return _select_in_order(pa.Table.from_batches(batches, SCHEMA), codes), groups.bytes_read + bytes_read


def iter_samples(receipt: ShardGroupReceipt, columns: list[str]) -> tuple[Iterator[pa.RecordBatch], int]:
    """Return batches of all samples of a shard group, and the size of their file.

    Args:
        receipt: The receipt of the shard group.
        columns: The columns of SCHEMA that are read.

    Returns:
        Batches of up to ROWS_AT_ONCE rows, in order of the codes, and the number of bytes of the file.

    Raises:
        SemiscaleError: The file is missing, damaged, of another shard group, or does not have one row per scored image.

    Cost:
        Memory for the encoded file, 10 to 20 bytes a sample, and one batch.
    """
    data = storage.read_or_none(receipt.samples)
    if data is None:
        raise corrupt_file_error(receipt.samples, "The file does not exist")
    with reraise_as_corrupt(receipt.samples):
        file = pq.ParquetFile(io.BytesIO(data))
    _check_identity(receipt, receipt.samples, file.metadata)
    if file.metadata.num_rows != receipt.scored:
        raise corrupt_file_error(
            receipt.samples,
            f"It has {file.metadata.num_rows:,} rows instead of one for each of {receipt.scored:,} images",
        )
    return _iter_batches(receipt.samples, file, columns), len(data)


def _check_identity(receipt: ShardGroupReceipt, uri: str, metadata: pq.FileMetaData) -> None:
    identity = (metadata.metadata or {}).get(_UNIT.encode(), b"").decode()
    if identity != receipt.digest:
        raise corrupt_file_error(uri, f"It is of shard group {identity or 'unknown'} instead of {receipt.digest}")


def _iter_batches(uri: str, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with reraise_as_corrupt(uri):
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns)


def _select_in_order(table: pa.Table, codes: U64) -> pa.Table:
    """Return the rows with these codes, in the order of the codes."""
    table_codes = table["sample"].to_numpy()
    order = np.argsort(table_codes)
    return table.take(pa.array(order[np.searchsorted(table_codes, codes, sorter=order)]))
