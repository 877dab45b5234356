"""Excerpts: the selected images that lie inside Parquet files, copied out, each file's one after the other.

A Parquet file gives up an image with its whole row group alone, and the rows of a tar lie in about as many files as it
has images. So each source file is read once, by one pod, and what was selected of it gets a place of its own.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from components.pack.rows import I64, Rows
from components.shared import shards as sharding
from components.shared import storage
from components.shared.errors import SemiscaleError
from components.shared.shards import Columns, Shard


@dataclass(frozen=True)
class Excerpt:
    """What is copied out of one Parquet file: the images at these indexes, of these sizes, in this order."""

    shard: str
    uri: str
    indexes: I64
    sizes_bytes: I64


def draw_up(rows: Rows, folder: str) -> tuple[Rows, list[Excerpt]]:
    """Return the rows with a place for every image, and the excerpts that those of Parquet files lie in."""
    inside = np.flatnonzero(rows.offset < 0)
    if not len(inside):
        return rows, []
    uri, offset, excerpts = rows.uri.copy(), rows.offset.copy(), list[Excerpt]()
    by_shard = inside[np.argsort(rows.shard[inside], kind="stable")]
    for mine in np.split(by_shard, np.flatnonzero(np.diff(rows.shard[by_shard])) + 1):
        indexes, where, image = np.unique(rows.index[mine], return_index=True, return_inverse=True)
        sizes = rows.size_bytes[mine][where]
        uri[mine] = len(rows.uris) + len(excerpts)
        offset[mine] = (np.cumsum(sizes) - sizes)[image]
        place = storage.join(folder, "excerpts", f"{len(excerpts):06}")
        excerpts.append(Excerpt(rows.shards[rows.shard[mine[0]]], place, indexes, sizes))
    uris = pa.concat_arrays([rows.uris, pa.array([excerpt.uri for excerpt in excerpts], rows.uris.type)])
    return replace(rows, uri=uri, offset=offset, uris=uris), excerpts


def copy(excerpt: Excerpt, shard: Shard, columns: Columns) -> bytes:
    """Return an excerpt's bytes. Raises SemiscaleError where an image is not what was scored.

    Reads the row groups that hold a selected image. Memory: one of them, and the selected images of one file, twice.
    """
    images = [sample.image for sample in sharding.pick(shard, excerpt.indexes.tolist(), columns)]
    if [len(image) for image in images] != excerpt.sizes_bytes.tolist():
        raise SemiscaleError(f"{shard.uri}: its images changed since they were scored; run the plan again")
    return b"".join(images)
