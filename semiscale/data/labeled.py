"""Load a planned labeled set: the samples of its shards, and their labels."""

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

# The largest labeled set that a training keeps in memory. A larger set is shuffled in windows of this size.
SHUFFLE_BUFFER_BYTES = 1 << 30


class LabeledSplit(StrictDocument):
    """One labeled set after planning.

    Attributes:
        digest: Identifies the shards, and the index and label of each sample.
        index: The URI of a Parquet file with one row per sample: shard, index, key, label.
        shards: The URI of the list of shards.
        samples: The number of samples.
        class_counts: The number of samples of each class.
    """

    digest: str
    index: str
    shards: str
    samples: int
    class_counts: list[int]


@dataclass(frozen=True, eq=False)
class LabeledShard:
    """One shard of a labeled set.

    Attributes:
        shard: The shard.
        labels: The label of each sample, by its index in the shard, or -1 for a sample outside the set.
    """

    shard: Shard
    labels: NDArray[np.int32]

    @cached_property
    def samples(self) -> int:
        """Count the samples of the set."""
        return int((self.labels >= 0).sum())

    def iter_samples(self, columns: SampleFields, prefetch: bool = False) -> Iterator[tuple[Sample, int]]:
        """Yield the samples of the set with their labels, in stored order.

        Args:
            columns: The names of the columns or keys, and whether samples are videos.
            prefetch: Whether threads fetch the next data meanwhile.

        Raises:
            FileNotFoundError: The shard is gone.
            SemiscaleError: The shard is damaged or has changed since it was listed.
        """
        labels = self.labels.tolist()
        for sample in reader.iter_samples(self.shard, columns, prefetch):
            if sample.index < len(labels) and labels[sample.index] >= 0:
                yield sample, labels[sample.index]


def load_split(split: LabeledSplit) -> list[LabeledShard]:
    """Load the shards and labels of a split.

    Cost:
        Memory for 4 bytes a sample, and for 60 bytes a sample while the index is read.
    """
    shards = [Shard.model_validate(shard) for shard in json.loads(storage.read_bytes(split.shards))]
    table = pq.read_table(io.BytesIO(storage.read_bytes(split.index)), columns=["shard", "index", "label"])
    shard, index, label = (column.to_numpy() for column in table.columns)
    rows = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard, minlength=len(shards)))[:-1])
    return [
        LabeledShard(shards[number], _labels_by_index(index[chosen], label[chosen]))
        for number, chosen in enumerate(rows)
        if len(chosen)
    ]


def load_packed_shards(uri: str) -> list[LabeledShard]:
    """Load the tars of a packed set with their labels.

    Cost:
        Memory for 4 bytes a sample, and for about as much text while the list is read.
    """
    listed = json.loads(storage.read_bytes(uri), object_hook=_convert_labels)
    return [LabeledShard(Shard.model_validate(item["shard"]), item["labels"]) for item in listed]


def _labels_by_index(index: NDArray[Any], label: NDArray[Any]) -> NDArray[np.int32]:
    labels = np.full(index.max() + 1, -1, np.int32)
    labels[index] = label
    return labels


def _convert_labels(item: dict[str, Any]) -> dict[str, Any]:
    """Convert the labels of a tar to an array while the JSON is parsed.

    A list of numbers takes nine times as much memory.
    """
    return {**item, "labels": np.array(item["labels"], np.int32)} if "labels" in item else item
