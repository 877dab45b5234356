"""Load the columns of D̂ that packing needs, in little memory."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage

I64 = NDArray[np.int64]
_COLUMNS = ("class", "shard", "index", "uri", "offset", "size_bytes")


@dataclass(frozen=True)
class SelectionColumns:
    """D̂ as columns of equal length, with one entry for each (image, class).

    Attributes:
        label: The class.
        shard: The number of the shard, an index into `shards`.
        index: The index of the image in the shard.
        uri: The number of the object that has the image, an index into `uris`.
        offset: The first byte of the image in this object, or -1 for an image in a Parquet file.
        size_bytes: The number of bytes of the image.
        shards: The names of the shards.
        uris: The URIs of the objects.
    """

    label: NDArray[np.uint16]
    shard: NDArray[np.int32]
    index: I64
    uri: NDArray[np.int32]
    offset: I64
    size_bytes: I64
    shards: list[str]
    uris: pa.Array

    def __len__(self) -> int:
        return len(self.label)


def load_selection(uri: str) -> SelectionColumns:
    """Read D̂.

    Cost:
        Memory: 34 bytes a row, and the name of each shard and each URI once.
    """
    with storage.open_object(uri) as file:
        table = pq.read_table(file, columns=list(_COLUMNS), read_dictionary=["shard", "uri"])
    # Each row group of a Parquet file has its own dictionary. All rows need the same one.
    label, shard, index, uris, offset, size_bytes = (column.combine_chunks() for column in table.unify_dictionaries())
    return SelectionColumns(
        label=label.to_numpy(),
        shard=shard.indices.to_numpy(),
        index=index.to_numpy(),
        uri=uris.indices.to_numpy(),
        offset=offset.to_numpy(),
        size_bytes=size_bytes.to_numpy(),
        shards=shard.dictionary.to_pylist(),
        uris=uris.dictionary,
    )
