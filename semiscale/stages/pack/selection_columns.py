"""D̂ in columns: what packing needs to know of each selected (image, class), in little memory."""

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
    """One entry an (image, class), in the selection's order. `shard` and `uri` number `shards` and `uris`.

    `offset` is where an image's bytes start in the object at its URI; -1 for one inside a Parquet file.
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
    """Read the selection. Memory: 34 bytes a row, and each shard's name and each URI once."""
    with storage.open_object(uri) as file:
        table = pq.read_table(file, columns=list(_COLUMNS), read_dictionary=["shard", "uri"])
    # Parquet keeps a dictionary in each row group; of all it makes one.
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
