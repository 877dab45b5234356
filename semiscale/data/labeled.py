"""A labeled set, read back: which samples of which shards, with which labels."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.data import reader
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.storage.documents import StrictDocument

SHUFFLE_BUFFER_BYTES = (
    1 << 30
)  # of a labeled set that a training keeps in memory; of a larger one, what it shuffles together


class LabeledSplit(StrictDocument):
    """One labeled set after planning. `index` is a Parquet file with one row a sample: shard, index, key, label."""

    digest: str
    index: str
    shards: str
    samples: int
    class_counts: list[int]


@dataclass(frozen=True, eq=False)
class LabeledShard:
    """One shard of a labeled set: `labels` by the index in the shard, -1 for a sample that does not belong."""

    shard: Shard
    labels: NDArray[np.int32]

    @cached_property
    def samples(self) -> int:
        """Count the samples that belong."""
        return int((self.labels >= 0).sum())

    def iter_samples(self, columns: SampleFields, prefetch: bool = False) -> Iterator[tuple[Sample, int]]:
        """Yield the samples that belong, with their labels; `prefetch`, what comes next is fetched meanwhile."""
        labels = self.labels.tolist()
        for sample in reader.iter_samples(self.shard, columns, prefetch):
            if sample.index < len(labels) and labels[sample.index] >= 0:
                yield sample, labels[sample.index]


def load_split(split: LabeledSplit) -> list[LabeledShard]:
    """Read a split's index. Memory: 4 bytes a sample, and for a moment 60."""
    shards = [Shard.model_validate(shard) for shard in json.loads(storage.read_bytes(split.shards))]
    table = pq.read_table(io.BytesIO(storage.read_bytes(split.index)), columns=["shard", "index", "label"])
    shard, index, label = (column.to_numpy() for column in table.columns)
    rows = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard, minlength=len(shards)))[:-1])
    return [
        LabeledShard(shards[number], _by_index(index[own], label[own])) for number, own in enumerate(rows) if len(own)
    ]


def load_packed_shards(uri: str) -> list[LabeledShard]:
    """Read the list of a packed set's tars. Memory: 4 bytes a sample, and for a moment its text, about as much."""
    listed = json.loads(storage.read_bytes(uri), object_hook=_with_array)
    return [LabeledShard(Shard.model_validate(item["shard"]), item["labels"]) for item in listed]


def _by_index(index: NDArray[Any], label: NDArray[Any]) -> NDArray[np.int32]:
    labels = np.full(index.max() + 1, -1, np.int32)
    labels[index] = label
    return labels


def _with_array(item: dict[str, Any]) -> dict[str, Any]:
    """Keep a tar's labels as an array as soon as they are read: a list of numbers is nine times its size."""
    return {**item, "labels": np.array(item["labels"], np.int32)} if "labels" in item else item
