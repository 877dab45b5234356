"""Measure the cost of packing: processor time of an image, a request and the layout.

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

IMAGE_BYTES = 110_000  # the mean of 400 photographs
POOL_IMAGES, PACKED = 4000, 1000
REQUESTS = 4000
LATENCY_S = 0.03


def random_images(count: int) -> list[bytes]:
    """Return noise that begins as a JPEG does: nothing here decodes."""
    rng = np.random.default_rng(0)
    return [b"\xff\xd8\xff" + rng.bytes(IMAGE_BYTES - 3) for _ in range(count)]


def write_pool(folder: Path) -> list[ByteLocation]:
    """Write tars of a thousand images each, and return where every image lies."""
    images, places = random_images(200), []
    for number in range(POOL_IMAGES // 1000):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in range(1000):
                member = tarfile.TarInfo(f"{image}.jpg")
                member.size = IMAGE_BYTES
                tar.addfile(member, io.BytesIO(images[image % len(images)]))
                places.append(ByteLocation(str(path), tar.offset - (-(-IMAGE_BYTES // 512) * 512), IMAGE_BYTES))
    return places


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor and the wall seconds of some work."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    work()
    return time.process_time() - cpu_s, time.monotonic() - wall_s


def copied(folder: Path) -> float:
    """Return processor seconds for one image read from its range and written into a tar."""
    places = write_pool(folder)
    lots = np.random.default_rng(1).permutation(len(places))[:PACKED]
    chosen = [places[lot] for lot in lots]

    def work() -> None:
        storage.write_bytes(str(folder / "packed.tar"), build_tar(range_reads.read_images(chosen), [0] * PACKED, 0))

    return spent(work)[0] / PACKED


class Store(BaseHTTPRequestHandler):
    """Answers every ranged request with an image's worth of bytes, after an object store's latency."""

    protocol_version = "HTTP/1.1"
    body = random_images(1)[0]

    def do_GET(self) -> None:
        """Answer."""
        time.sleep(LATENCY_S)
        self.send_response(206)
        for name, value in (("Content-Length", len(self.body)), ("ETag", '"1"'), ("Content-Type", "image/jpeg")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def serve() -> None:
    """Serve on a free port until standard input closes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


def requested() -> tuple[float, float]:
    """Return processor and wall seconds of one ranged request among READERS at a time."""
    command = [sys.executable, "-c", "from benchmarks.pack import serve; serve()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        port = server.stdout.readline().strip()
        os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
        os.environ.update(AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
        places = [ByteLocation("s3://pool/shard.tar", number << 20, IMAGE_BYTES) for number in range(REQUESTS)]
        range_reads.read_images(places[:64])  # opens the connections
        cpu_s, wall_s = spent(lambda: range_reads.read_images(places))
        server.stdin.close()
    return cpu_s / REQUESTS, wall_s / REQUESTS


def drawn_up(rows: int) -> float:
    """Return processor seconds of the layout of so many rows over a million shards."""
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
    return spent(lambda: tar_layout.plan_layout(selection, 256 << 20, 0))[0]


def main() -> None:
    """Measure all three, and print the numbers as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copied_s = copied(Path(folder))
    request_cpu_s, request_wall_s = requested()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    layout_s = drawn_up(arguments.rows)
    numbers = {
        "cpu_ms_per_image_from_disk": round(copied_s * 1e3, 3),
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
