"""Excerpts: the selected images that lie inside Parquet files, copied out, each file's one after the other.

A Parquet file gives up an image with its whole row group alone, and the rows of a tar lie in about as many files as it
has images. So each source file is read once, by one pod, and what was selected of it gets a place of its own.
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
    """What is copied out of one Parquet file: the images at these indexes, of these sizes, in this order."""

    shard: str
    uri: str
    indexes: I64
    sizes_bytes: I64


def plan_extracts(rows: SelectionColumns, folder: str) -> tuple[SelectionColumns, list[ParquetExtract]]:
    """Return the rows with a place for every image, and the excerpts that those of Parquet files lie in."""
    inside = np.flatnonzero(rows.offset < 0)
    if not len(inside):
        return rows, []
    uri, offset, excerpts = rows.uri.copy(), rows.offset.copy(), list[ParquetExtract]()
    by_shard = inside[np.argsort(rows.shard[inside], kind="stable")]
    for mine in np.split(by_shard, np.flatnonzero(np.diff(rows.shard[by_shard])) + 1):
        indexes, where, image = np.unique(rows.index[mine], return_index=True, return_inverse=True)
        sizes = rows.size_bytes[mine][where]
        uri[mine] = len(rows.uris) + len(excerpts)
        offset[mine] = (np.cumsum(sizes) - sizes)[image]
        place = storage.join(folder, "excerpts", f"{len(excerpts):06}")
        excerpts.append(ParquetExtract(rows.shards[rows.shard[mine[0]]], place, indexes, sizes))
    uris = pa.concat_arrays([rows.uris, pa.array([excerpt.uri for excerpt in excerpts], rows.uris.type)])
    return replace(rows, uri=uri, offset=offset, uris=uris), excerpts


def read_extract(excerpt: ParquetExtract, shard: Shard, columns: SampleFields) -> bytes:
    """Return an excerpt's bytes. Raises SemiscaleError where an image is not what was scored.

    Reads the row groups that hold a selected image. Memory: one of them, and the selected images of one file, twice.
    """
    images = [sample.image for sample in parquet_reader.read_samples_at(shard, excerpt.indexes.tolist(), columns)]
    if [len(image) for image in images] != excerpt.sizes_bytes.tolist():
        raise SemiscaleError(
            "SEMI-E321", f"{shard.uri}: The images of this file changed after they were scored. Run the plan again."
        )
    return b"".join(images)
