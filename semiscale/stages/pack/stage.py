"""Pack: copy D̂ into shuffled WebDataset tars, because a student cannot read images at random from the whole pool.

Any number of pods share the tars by claims. A pod makes a tar whole: it reads the tar's images by their byte ranges
from as many source shards, and writes them once. Images inside Parquet files have no byte range of their own; before
the tars, the pods share those source files and copy what is selected out of each (excerpts.py).

What it costs for the paper's D̂, 16 million images of 110 kB out of a billion: benchmarks/README.md.
"""

import io
import json
import tarfile
import time
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semiscale import storage
from semiscale.common.signals import graceful_stop
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.run_once import run_once
from semiscale.stages.pack import pack_plan, parquet_extracts, range_reads
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.parquet_extracts import ParquetExtract
from semiscale.stages.pack.range_reads import ByteLocation
from semiscale.storage.documents import load_document
from semiscale.storage.leases import LeaseManager

POLL_INTERVAL_S = 2.0  # how often a pod with nothing to do looks whether the others are alive
ITEMS_PER_REFRESH = 16  # pieces of work before a pod looks anew what the others have finished


def pack(config: PackConfig) -> PackReceipt:
    """Write every row of D̂ as one sample, `.cls` beside the image, in an order drawn from the seed.

    Equal selections and seeds give equal bytes, whatever the pods. Returns when all tars are there, whoever wrote them.
    Memory: three tars, about 100 bytes a row of D̂ and 1 kB a shard of the pool. Raises SemiscaleError where an image
    is not what was scored, Stopped on SIGTERM.
    """
    with graceful_stop():  # claims are given back on the way out
        return run_once(config, PackReceipt, lambda folder: _PackWorker(config, folder).work())


class _PackWorker:
    """What one pod does."""

    def __init__(self, config: PackConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        self._plan = load_document(config.plan, PlanReceipt)
        self._pods = load_document(config.count, FanoutReceipt).pods if config.count else self._plan.pods
        self._pieces = pack_plan.build_pack_plan(config, folder)
        self._claims = LeaseManager(folder)
        self._progress = Progress("pack", len(self._pieces.rows))

    def work(self) -> dict[str, object]:
        """Write what is not there yet, until all of it is; returns the receipt's fields."""
        copied, tars, rows = self._pieces.excerpts, self._pieces.tars, self._pieces.rows
        if self._pieces.missing(tars):
            shards = load_shards_by_name(self._plan)
            versions = source_versions(rows.uris, shards.values())
            if copied:
                self._share(list(copied), lambda uri: self._copy_out(copied[uri], shards))
            self._share(list(tars), lambda uri: self._pack(uri, versions))
        sizes = self._pieces.written_sizes()
        listed = storage.join(self._folder, "shards.json")
        storage.write_bytes(listed, self._listed(sizes))
        for uri in copied:
            storage.delete(uri)
        return {
            "shards": listed,
            "tars": len(tars),
            "samples": len(rows),
            "class_counts": np.bincount(rows.label, minlength=len(self._plan.classes)).tolist(),
            "size_bytes": sum(sizes[uri] for uri in tars),
        }

    def _share(self, uris: list[str], write: Callable[[str], None]) -> None:
        """Write objects that are neither there nor claimed, each pod from its own place in what is left, until all are.

        What other pods hold is waited for: should one of them die, its work is taken over.
        """
        missing = self._pieces.missing(uris)
        start = self._config.pod * len(missing) // self._pods
        missing = [*missing[start:], *missing[:start]]
        while missing:
            others = self._claims.active()
            free = [uri for uri in missing if PurePosixPath(uri).stem not in others]
            written = (uri for uri in free if self._claimed(uri, write))
            if not list(islice(written, ITEMS_PER_REFRESH)):
                log_info("pack", f"with other pods: {len(missing)} of {len(uris)}")
                time.sleep(POLL_INTERVAL_S)
            missing = self._pieces.missing(missing)

    def _claimed(self, uri: str, write: Callable[[str], None]) -> bool:
        with self._claims.lease(PurePosixPath(uri).stem) as mine:
            # Whoever held it until now may have written it since we looked.
            if mine and storage.head(uri) is None:
                write(uri)
        return mine

    def _copy_out(self, excerpt: ParquetExtract, shards: dict[str, Shard]) -> None:
        columns = SampleFields(self._config.image_column, "")
        with self._progress.timer("excerpts"):
            storage.write_bytes(excerpt.uri, parquet_extracts.read_extract(excerpt, shards[excerpt.shard], columns))
        log_info("pack", f"{excerpt.shard}: {len(excerpt.indexes):,} images copied out")

    def _pack(self, uri: str, versions: pa.Array) -> None:
        drawn, rows, tar = self._pieces.layout, self._pieces.rows, self._pieces.tars[uri]
        chosen = drawn.rows_in_tar(tar)
        uris, listed = (column.take(pa.array(rows.uri[chosen])).to_pylist() for column in (rows.uris, versions))
        columns = (uris, rows.offset[chosen], rows.size_bytes[chosen], listed)
        places = [ByteLocation(*place) for place in zip(*columns, strict=True)]
        with self._progress.timer("read"):
            images = range_reads.read_images(places)
        self._claims.heartbeat()
        with self._progress.timer("write"):
            storage.write_bytes(uri, build_tar(images, rows.label[chosen].tolist(), drawn.edges[tar]))
        self._progress.update(len(images), PurePosixPath(uri).name)

    def _listed(self, sizes: dict[str, int]) -> bytes:
        """List the tars as a labeled set's shards, with the labels of their samples."""
        return (
            b"[" + b",\n".join(self._listed_one(uri, tar, sizes[uri]) for uri, tar in self._pieces.tars.items()) + b"]"
        )

    def _listed_one(self, uri: str, tar: int, size_bytes: int) -> bytes:
        shard = Shard(uri=uri, name=PurePosixPath(uri).name, kind="tar", size_bytes=size_bytes, version="")
        labels = self._pieces.rows.label[self._pieces.layout.rows_in_tar(tar)].tolist()
        return json.dumps({"shard": shard.model_dump(), "labels": labels}).encode()


def load_shards_by_name(plan: PlanReceipt) -> dict[str, Shard]:
    """Read the shards of the pool. Memory: about 1 kB a shard."""
    units = [ShardGroup.model_validate(unit) for unit in json.loads(storage.read_bytes(plan.units))]
    return {shard.name: shard for unit in units for shard in unit.shards}


def source_versions(uris: pa.Array, shards: Collection[Shard]) -> pa.Array:
    """Return the version that was listed, and so was scored, of each of these URIs: of tars and of loose files.

    Excerpts have none, and neither has what a Parquet file links to, which is taken as it is.
    """
    listed = [(file.uri, file.version) for shard in shards for file in shard.files]
    listed += [(shard.uri, shard.version) for shard in shards if not shard.files]
    places = pc.index_in(uris, value_set=pa.array([uri for uri, _ in listed], uris.type))
    return pa.array([version for _, version in listed], pa.string()).take(places).fill_null("")


def build_tar(images: list[bytes], labels: list[int], start: int) -> bytes:
    """Return a tar of samples, numbered from `start`; equal samples give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=start):
            for suffix, data in (("cls", str(label).encode()), (range_reads.detect_extension(image), image)):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


__all__ = ["PackConfig", "pack"]
