"""Copy the selected images of a Parquet file into one object, the extract.

An image in a Parquet file can only be read with its whole row group. The images of a tar come from about as many files
as the tar has images, so a tar would read as many row groups. Instead, one pod reads each Parquet file once, and copies
its selected images one after the other. In the extract each image has a byte range of its own.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import parquet_reader
from semiscale.data.shard import SampleFields, Shard
from semiscale.stages.pack.selection_columns import I64, SelectionColumns


@dataclass(frozen=True)
class ParquetExtract:
    """The selected images of one Parquet file.

    Attributes:
        shard: The name of the Parquet file.
        uri: The object that the images are copied to.
        indexes: The indexes of the images in the file, in ascending order.
        sizes_bytes: The sizes of the images, in the same order.
    """

    shard: str
    uri: str
    indexes: I64
    sizes_bytes: I64


def plan_extracts(rows: SelectionColumns, folder: str) -> tuple[SelectionColumns, list[ParquetExtract]]:
    """Plan an extract for each Parquet file that has selected images.

    Args:
        rows: D̂. An image in a Parquet file has the offset -1.
        folder: URI of the packed set.

    Returns:
        D̂ with a byte range for every image, and the extracts.
    """
    in_parquet = np.flatnonzero(rows.offset < 0)
    if not len(in_parquet):
        return rows, []
    uri, offset, extracts = rows.uri.copy(), rows.offset.copy(), list[ParquetExtract]()
    by_shard = in_parquet[np.argsort(rows.shard[in_parquet], kind="stable")]
    for shard_rows in np.split(by_shard, np.flatnonzero(np.diff(rows.shard[by_shard])) + 1):
        # An image in several classes has several rows, and is copied once.
        indexes, first_row, image = np.unique(rows.index[shard_rows], return_index=True, return_inverse=True)
        sizes = rows.size_bytes[shard_rows][first_row]
        uri[shard_rows] = len(rows.uris) + len(extracts)
        offset[shard_rows] = (np.cumsum(sizes) - sizes)[image]
        # The folder in the workdir has the older name of the extracts.
        extract_uri = storage.join(folder, "excerpts", f"{len(extracts):06}")
        extracts.append(ParquetExtract(rows.shards[rows.shard[shard_rows[0]]], extract_uri, indexes, sizes))
    uris = pa.concat_arrays([rows.uris, pa.array([extract.uri for extract in extracts], rows.uris.type)])
    return replace(rows, uri=uri, offset=offset, uris=uris), extracts


def read_extract(extract: ParquetExtract, shard: Shard, columns: SampleFields) -> bytes:
    """Return the bytes of an extract.

    Args:
        extract: The images to copy.
        shard: The Parquet file.
        columns: The columns of the file.

    Raises:
        SemiscaleError: The file is not the one that was scored.

    Cost:
        Reads the row groups that have a selected image. Memory for one row group, and for the selected images of the
        file twice.
    """
    images = [sample.image for sample in parquet_reader.read_samples_at(shard, extract.indexes.tolist(), columns)]
    if [len(image) for image in images] != extract.sizes_bytes.tolist():
        raise SemiscaleError(
            "SEMI-E321", f"{shard.uri}: The images of this file changed after they were scored. Run the plan again."
        )
    return b"".join(images)
