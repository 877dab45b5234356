"""Pack: copy D̂ into shuffled WebDataset tars, because a student cannot read images at random from the whole pool."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.shared import shards as sharding
from components.shared import storage
from components.shared.errors import SemiscaleError
from components.shared.progress import Progress
from components.shared.receipts import PackReceipt, PlanReceipt, SelectionReceipt, load
from components.shared.shards import Columns, Shard, Unit
from components.shared.stage import ReceiptUri, StageConfig, digest, once

SAMPLES_PER_TAR = 10_000
READERS = 32  # requests in flight: hides an object store's latency


class PackConfig(StageConfig):
    """Which selection to pack, and the seed of its order."""

    stage: ClassVar[str] = "pack"

    plan: ReceiptUri
    """The plan's receipt: it names the shards to copy from."""
    selection: ReceiptUri
    """The merge's receipt."""
    image_column: str = "image"
    """Parquet column of the images."""
    seed: int = 0
    """Of the order."""

    def digest(self) -> str:
        """The packed set depends on the selection and the order alone."""
        return digest(self.stage, load(self.selection, SelectionReceipt).digest, self.image_column, self.seed)


def pack(config: PackConfig) -> PackReceipt:
    """Write every row of D̂ as one sample, `.cls` beside the image, in an order drawn from the seed.

    An image in two classes is stored twice, at two random places (section 3.2: "allowing the image to be replicated").
    Reads the selected images' bytes only, except from Parquet files, of which it reads the row groups that hold them.
    Memory: one tar of SAMPLES_PER_TAR images.
    """
    return once(config, PackReceipt, lambda folder: _work(config, folder))


def _work(config: PackConfig, folder: str) -> dict[str, object]:
    plan = load(config.plan, PlanReceipt)
    selection = pq.read_table(io.BytesIO(storage.read(load(config.selection, SelectionReceipt).selection)))
    order = np.random.default_rng(config.seed).permutation(len(selection))
    progress = Progress("pack", len(selection))
    source = _Source(plan, Columns(config.image_column, ""))
    listed: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(order), SAMPLES_PER_TAR)):
        rows = selection.take(pa.array(order[start : start + SAMPLES_PER_TAR])).to_pylist()
        uri = storage.join(folder, f"packed-{number:06}.tar")
        data = tar_of(source.samples(rows, progress), start)
        storage.write(uri, data)
        shard = Shard(uri=uri, name=f"packed-{number:06}.tar", kind="tar", size_bytes=len(data), version="")
        listed.append({"shard": shard.model_dump(), "labels": [row["class"] for row in rows]})
    shards = storage.join(folder, "shards.json")
    storage.write(shards, json.dumps(listed).encode())
    counts = Counter(label for tar in listed for label in tar["labels"])
    return {
        "shards": shards,
        "tars": len(listed),
        "samples": len(selection),
        "class_counts": [counts[number] for number in range(len(plan.classes))],
        "size_bytes": sum(tar["shard"]["size_bytes"] for tar in listed),
    }


class _Source:
    """Reads selected images: by byte range from tars and loose files, by shard from Parquet files."""

    def __init__(self, plan: PlanReceipt, columns: Columns) -> None:
        units = [Unit.model_validate(unit) for unit in json.loads(storage.read(plan.units))]
        self._shards = {shard.name: shard for unit in units for shard in unit.shards}
        self._columns = columns

    def samples(self, rows: list[dict[str, Any]], progress: Progress) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield each row with its image's bytes. Raises SemiscaleError where an image is not what was scored."""
        inside = self._inside_parquet(rows)
        with ThreadPoolExecutor(READERS) as pool:
            for row, image in zip(rows, pool.map(lambda row: self._image(row, inside), rows), strict=True):
                if len(image) != row["size_bytes"]:
                    raise SemiscaleError(f"{row['uri']} {row['key']}: changed since it was scored; run the plan again")
                progress.add(1)
                yield row, image

    def _image(self, row: dict[str, Any], inside: dict[tuple[str, int], bytes]) -> bytes:
        if row["offset"] < 0:
            return inside.get((row["shard"], row["index"]), b"")
        return sharding.read_bytes(row["uri"], row["offset"], row["size_bytes"])

    def _inside_parquet(self, rows: list[dict[str, Any]]) -> dict[tuple[str, int], bytes]:
        wanted: dict[str, set[int]] = {}
        for row in rows:
            if row["offset"] < 0:
                wanted.setdefault(row["shard"], set()).add(row["index"])
        return {
            (name, sample.index): sample.image
            for name, indexes in wanted.items()
            for sample in sharding.read(self._shards[name], self._columns)
            if sample.index in indexes
        }


def tar_of(samples: Iterator[tuple[dict[str, Any], bytes]], start: int) -> bytes:
    """Return a tar of samples, numbered from `start`; equal samples give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (row, image) in enumerate(samples, start=start):
            for suffix, data in (("cls", str(row["class"]).encode()), (image_suffix(image), image)):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def image_suffix(image: bytes) -> str:
    """Name an image's format by its first bytes."""
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image[8:12] == b"WEBP" else "jpg"
