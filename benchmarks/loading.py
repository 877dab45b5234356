"""Measure the reading of a packed set larger than memory, on 1, 2 and 4 ranks.

    python -m benchmarks.loading

The packed set has random bytes in place of images of 110 kB. It takes half a GB on this machine's disk. The ranks read
an epoch one after the other. The shuffle window is a 16th of the set. Nothing is decoded, so the figure is the upper
limit that the parsing of tars allows.
"""

import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from semiscale.data.labeled import LabeledShard
from semiscale.data.listing import list_shards
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.sample_source import StreamingSource
from semiscale.stages.train.input_pipeline.train_transform import TrainTransform

IMAGE_BYTES = 110_000
BATCH = 256
TARS = 256
# Shuffle windows in the set.
WINDOWS = 16


def write_tars(folder: Path) -> list[LabeledShard]:
    """Write tars of random sizes, so that streams begin anywhere in them."""
    sizes = np.random.default_rng(1).integers(10, 30, TARS).tolist()
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    for number, samples in enumerate(sizes):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for key in range(100 * number, 100 * number + samples):
                for suffix, content in (("cls", b"1"), ("jpg", image)):
                    member = tarfile.TarInfo(f"{key:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    shards = list_shards([str(folder)])
    return [LabeledShard(shard, np.ones(samples, np.int32)) for shard, samples in zip(shards, sizes, strict=True)]


def bytes_read() -> int:
    """Return the bytes that this process has read, as Linux counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(shards: list[LabeledShard], ranks: DistributedContext) -> str:
    """Read an epoch of one rank.

    Args:
        shards: The packed set.
        ranks: The rank and the world size.

    Returns:
        A line with the rate, the processor time and the share of the set that was read.
    """
    transform = TrainTransform(Preprocessing(resolution=224, augmentation="crop-flip"))
    total = sum(shard.samples for shard in shards)
    source = StreamingSource(shards, SampleFields(), 0, ranks, transform.make_sample, total // WINDOWS)
    bytes_before, started, cpu_before_s = bytes_read(), time.perf_counter(), time.process_time()
    samples = sum(len(batch) for batch in source.batches(BATCH, total // BATCH, 0))
    samples_per_s = samples / (time.perf_counter() - started)
    cpu_us = 1e6 * (time.process_time() - cpu_before_s) / samples
    share = (bytes_read() - bytes_before) / sum(shard.shard.size_bytes for shard in shards)
    return f"{samples_per_s:,.0f} samples/s, {cpu_us:.0f} CPU-us a sample, {share:.3f} of the set read"


def main() -> None:
    """Measure each rank, and print a line for it."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_tars(Path(folder))
        for count in (1, 2, 4):
            for rank in range(count):
                print(f"rank {rank} of {count}: {measure(shards, DistributedContext(rank, count))}")


if __name__ == "__main__":
    main()
