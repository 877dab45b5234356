"""Measure the processor time of packing: an image, a request and the layout.

    make bench-pack

Photographs are drawn from a local pool of tars, so the program is measured and not a disk. The ranged requests go
through boto3 to a server on this machine, in its own process. The layout is computed for the paper's 16 million rows.
The last line is one JSON object.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa

from semiscale import storage
from semiscale.stages.pack import range_reads, tar_layout
from semiscale.stages.pack.range_reads import ByteLocation
from semiscale.stages.pack.selection_columns import SelectionColumns
from semiscale.stages.pack.stage import build_tar

# The mean of 400 photographs.
IMAGE_BYTES = 110_000
POOL_IMAGES, PACKED_IMAGES = 4000, 1000
REQUESTS = 4000
LATENCY_S = 0.03


def random_images(count: int) -> list[bytes]:
    """Return noise that begins like a JPEG. Nothing decodes it."""
    rng = np.random.default_rng(0)
    return [b"\xff\xd8\xff" + rng.bytes(IMAGE_BYTES - 3) for _ in range(count)]


def write_pool(folder: Path) -> list[ByteLocation]:
    """Write tars of a thousand images each, and return the location of every image."""
    images, locations = random_images(200), []
    for number in range(POOL_IMAGES // 1000):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in range(1000):
                member = tarfile.TarInfo(f"{image}.jpg")
                member.size = IMAGE_BYTES
                tar.addfile(member, io.BytesIO(images[image % len(images)]))
                locations.append(ByteLocation(str(path), tar.offset - (-(-IMAGE_BYTES // 512) * 512), IMAGE_BYTES))
    return locations


def measure_time(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor seconds and the wall seconds of some work."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    work()
    return time.process_time() - cpu_s, time.monotonic() - wall_s


def measure_copy(folder: Path) -> float:
    """Return the processor seconds to read an image from its range and write it."""
    locations = write_pool(folder)
    indexes = np.random.default_rng(1).permutation(len(locations))[:PACKED_IMAGES]
    selected = [locations[index] for index in indexes]

    def work() -> None:
        storage.write_bytes(
            str(folder / "packed.tar"), build_tar(range_reads.read_images(selected), [0] * PACKED_IMAGES, 0)
        )

    return measure_time(work)[0] / PACKED_IMAGES


class Store(BaseHTTPRequestHandler):
    """Answers every ranged request with the bytes of an image, after a latency."""

    protocol_version = "HTTP/1.1"
    body = random_images(1)[0]

    def do_GET(self) -> None:
        """Send the bytes of an image."""
        time.sleep(LATENCY_S)
        self.send_response(206)
        for name, value in (("Content-Length", len(self.body)), ("ETag", '"1"'), ("Content-Type", "image/jpeg")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


def serve() -> None:
    """Serve on a free port until standard input closes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


def measure_request() -> tuple[float, float]:
    """Return the processor and wall seconds of one of many concurrent requests."""
    command = [sys.executable, "-c", "from benchmarks.pack import serve; serve()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        port = server.stdout.readline().strip()
        os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
        os.environ.update(AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
        locations = [ByteLocation("s3://pool/shard.tar", number << 20, IMAGE_BYTES) for number in range(REQUESTS)]
        # The first requests open the connections.
        range_reads.read_images(locations[:64])
        cpu_s, wall_s = measure_time(lambda: range_reads.read_images(locations))
        server.stdin.close()
    return cpu_s / REQUESTS, wall_s / REQUESTS


def measure_layout(rows: int) -> float:
    """Return the processor seconds of the layout of rows, 16 of them in each shard."""
    rng = np.random.default_rng(2)
    shards = max(rows // 16, 1)
    names = [f"part-{number:07}.tar" for number in range(shards)]
    selection = SelectionColumns(
        label=np.repeat(np.arange(1000, dtype=np.uint16), rows // 1000),
        shard=rng.integers(0, shards, rows, np.int32),
        index=rng.integers(0, 1000, rows),
        uri=np.zeros(rows, np.int32),
        offset=np.zeros(rows, np.int64),
        size_bytes=np.full(rows, IMAGE_BYTES),
        shards=names,
        uris=pa.array(names),
    )
    return measure_time(lambda: tar_layout.plan_layout(selection, 256 << 20, 0))[0]


def main() -> None:
    """Measure copy, request and layout. Print the numbers as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_s = measure_copy(Path(folder))
    request_cpu_s, request_wall_s = measure_request()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    layout_s = measure_layout(arguments.rows)
    numbers = {
        "cpu_ms_per_image_from_disk": round(copy_s * 1e3, 3),
        "cpu_ms_per_request": round(request_cpu_s * 1e3, 3),
        "requests_per_s": round(1 / request_wall_s),
        "layout_rows": arguments.rows,
        "layout_cpu_s": round(layout_s, 1),
        "peak_rss_bytes_before_layout": before,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
