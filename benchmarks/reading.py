"""Measure the images a second of a scoring pod, with and without prefetching.

    python -m benchmarks.reading

Images of 110 kB, made of noise, lie in a server of this machine that answers 30 ms late. They are loose files, files
that a Parquet file links, and members of a tar. One thread reads them as scoring does. It needs a millisecond an
image, so scoring reads 1,000 images a second at best.
"""

import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage
from semiscale.data.listing import list_shards
from semiscale.data.reader import iter_samples
from semiscale.data.shard import SampleFields, Shard
from tests.support.proxies import serve_delayed
from tests.support.servers import serve_store

IMAGES, IMAGE_BYTES, LATENCY_S, WORK_S = 256, 110_000, 0.03, 0.001
IMAGES_IN_TAR = 1024


def main() -> None:
    """Measure each kind of shard, and print a line for it."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
    with serve_store("s3") as address:
        os.environ["AWS_ENDPOINT_URL"] = address
        boto3.client("s3").create_bucket(Bucket="pool")
        write_images("s3://pool")
        shards = list_shards(["s3://pool/files", "s3://pool/links.parquet", "s3://pool/a.tar"])
        storage._open_store.cache_clear()
        with serve_delayed(address, LATENCY_S) as relay:
            os.environ["AWS_ENDPOINT_URL"] = relay.address
            for shard in shards:
                sequential, prefetched = (measure(shard, prefetch) for prefetch in (False, True))
                print(
                    f"{shard.kind:8} {sequential:6.0f} images/s in sequence, {prefetched:6.0f} with prefetching",
                    flush=True,
                )


def write_images(root: str) -> None:
    """Write the images as files, as links and as members of a tar."""
    rng = np.random.default_rng(0)
    links = [f"{root}/files/{number:05}.jpg" for number in range(IMAGES)]
    for link in links:
        storage.write_bytes(link, rng.bytes(IMAGE_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"image": links}), f"{folder}/links.parquet")
        with tarfile.open(f"{folder}/a.tar", "w") as tar:
            for number in range(IMAGES_IN_TAR):
                member = tarfile.TarInfo(f"{number:05}.jpg")
                member.size = IMAGE_BYTES
                tar.addfile(member, io.BytesIO(rng.bytes(IMAGE_BYTES)))
        for name in ("links.parquet", "a.tar"):
            storage.upload(Path(folder) / name, f"{root}/{name}")


def measure(shard: Shard, prefetch: bool) -> float:
    """Return the images a second of reading a shard.

    Args:
        shard: The shard.
        prefetch: Whether the next images are read while one is decoded.
    """
    started, images = time.perf_counter(), 0
    for _ in iter_samples(shard, SampleFields(label=""), prefetch=prefetch):
        images += 1
        time.sleep(WORK_S)
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
