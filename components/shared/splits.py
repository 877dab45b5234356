"""A planned labeled set, read back: which samples of which shards, with which labels."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from components.shared import shards as sharding
from components.shared import storage
from components.shared.receipts import Split
from components.shared.shards import Columns, Sample, Shard


@dataclass(frozen=True)
class LabeledShard:
    """One shard of a labeled set and the samples of it that belong: index in the shard to label."""

    shard: Shard
    labels: dict[int, int]

    def read(self, columns: Columns) -> Iterator[tuple[Sample, int]]:
        """Yield the samples that belong, with their labels."""
        for sample in sharding.read(self.shard, columns):
            label = self.labels.get(sample.index)
            if label is not None:
                yield sample, label


def read_split(split: Split) -> list[LabeledShard]:
    """Read a split's index. Memory: about 100 bytes a sample."""
    shards = [Shard.model_validate(shard) for shard in json.loads(storage.read(split.shards))]
    labels: list[dict[int, int]] = [{} for _ in shards]
    table = pq.read_table(io.BytesIO(storage.read(split.index)), columns=["shard", "index", "label"])
    for shard, index, label in zip(*(column.to_pylist() for column in table.columns), strict=True):
        labels[shard][index] = label
    return [LabeledShard(shard, found) for shard, found in zip(shards, labels, strict=True) if found]
