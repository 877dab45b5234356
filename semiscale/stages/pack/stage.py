"""Copy D̂ into shuffled WebDataset tars.

A student cannot read images at random from the whole pool, so the selected images are copied once. Any number of pods
share the tars by leases. A pod makes a whole tar: it reads the images by their byte ranges from as many source shards,
and writes them once. An image inside a Parquet file has no byte range of its own. Before the tars, the pods share these
files and copy the selected images of each into one object, the extract (parquet_extracts.py).
"""

import io
import json
import tarfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semiscale import storage
from semiscale.common.signals import graceful_stop
from semiscale.config.resources import IndexedJobSettings
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.follower import end_when_abandoned
from semiscale.runtime.indexed_job import run_indexed_job
from semiscale.runtime.run_once import run_once
from semiscale.runtime.shared_work import SharedWork, rotate_to_start
from semiscale.stages.pack import parquet_extracts, range_reads
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.pack_plan import PackPlan, build_pack_plan
from semiscale.stages.pack.range_reads import ByteLocation
from semiscale.storage.documents import load_document
from semiscale.storage.leases import LeaseManager

# Leased items after which a pod lists again what the other pods have finished.
ITEMS_PER_REFRESH = 16


def pack(config: PackConfig) -> PackReceipt:
    """Write every row of D̂ as one sample of a tar, in a random order.

    A sample is an image with a `.cls` file. The seed decides the order. Equal selections and seeds give equal bytes,
    for any number of pods. The call returns when all tars are written, by any pod.

    Args:
        config: The inputs of this pod.

    Returns:
        The receipt of the whole packed set.

    Raises:
        SemiscaleError: An image differs from the one that was scored.
        AbandonedError: No task follows the Job of this pod any more.
        TerminatedError: SIGTERM arrived.

    Cost:
        Memory: three tars, about 100 bytes a row of D̂ and 1 kB a shard of the pool.
    """
    folder = config.folder()
    # SIGTERM raises, so that the leases are released.
    with graceful_stop(), end_when_abandoned(folder, config, config.plan):
        if launch := IndexedJobSettings.from_env():
            receipt_uri = storage.join(folder, "receipt.json")
            # The pods of the Job write the receipt, which `run_once` then finds.
            run_indexed_job(config, config.count, launch, folder, lambda: storage.head(receipt_uri) is not None)
        return run_once(config, PackReceipt, partial(_pack_selection, config), folder)


def _pack_selection(config: PackConfig, folder: str) -> dict[str, object]:
    """Write the missing objects of the packed set, and return the receipt's fields.

    The call returns when all objects are written, by any pod.
    """
    plan = load_document(config.plan, PlanReceipt)
    pods = load_document(config.count, FanoutReceipt).pods if config.count else plan.pods
    pack_plan = build_pack_plan(config, folder)
    tars, rows = pack_plan.tars, pack_plan.rows
    if pack_plan.list_missing(tars):
        leases = LeaseManager(folder)
        writer = _PackWriter(config, pack_plan, load_shards_by_name(plan), leases.heartbeat)
        work = SharedWork[str](
            leases,
            "pack",
            "objects",
            lease_name=lambda uri: PurePosixPath(uri).stem,
            list_unfinished=pack_plan.list_missing,
            is_done_under_lease=lambda uri: storage.head(uri) is not None,
            items_per_round=ITEMS_PER_REFRESH,
        )
        # The tars read from the extracts, so all extracts come first.
        if pack_plan.extracts:
            work.run_each(
                rotate_to_start(pack_plan.list_missing(pack_plan.extracts), config.pod, pods), writer.write_extract
            )
        work.run_each(rotate_to_start(pack_plan.list_missing(tars), config.pod, pods), writer.write_tar)

    sizes = pack_plan.written_sizes()
    shards_uri = storage.join(folder, "shards.json")
    storage.write_bytes(shards_uri, _shard_list(pack_plan, sizes))
    for uri in pack_plan.extracts:
        storage.delete(uri)
    return {
        "shards": shards_uri,
        "tars": len(tars),
        "samples": len(rows),
        "class_counts": np.bincount(rows.label, minlength=len(plan.classes)).tolist(),
        "size_bytes": sum(sizes[uri] for uri in tars),
    }


class _PackWriter:
    """Writes single objects of a packed set.

    Args:
        config: The inputs of this pod.
        pack_plan: The objects of the packed set and their rows.
        shards: Shards of the pool by name.
        heartbeat: Keeps the pod's leases alive.
    """

    def __init__(
        self, config: PackConfig, pack_plan: PackPlan, shards: dict[str, Shard], heartbeat: Callable[[], None]
    ) -> None:
        self._plan, self._shards, self._heartbeat = pack_plan, shards, heartbeat
        self._columns = SampleFields(config.image_column, "")
        self._versions = source_versions(pack_plan.rows.uris, shards.values())
        self._progress = Progress("pack", len(pack_plan.rows))

    def write_extract(self, uri: str) -> None:
        """Copy the selected images of one Parquet file into one object."""
        extract = self._plan.extracts[uri]
        # A label of a metric has this older name of the extracts.
        with self._progress.timer("excerpts"):
            storage.write_bytes(uri, parquet_extracts.read_extract(extract, self._shards[extract.shard], self._columns))
        log_info("pack", f"{extract.shard}: {len(extract.indexes):,} images copied out")

    def write_tar(self, uri: str) -> None:
        """Read the images of one tar from their shards and write the tar."""
        layout, rows, tar = self._plan.layout, self._plan.rows, self._plan.tars[uri]
        chosen = layout.rows_in_tar(tar)
        uris, versions = (column.take(pa.array(rows.uri[chosen])).to_pylist() for column in (rows.uris, self._versions))
        columns = (uris, rows.offset[chosen], rows.size_bytes[chosen], versions)
        locations = [ByteLocation(*location) for location in zip(*columns, strict=True)]
        with self._progress.timer("read"):
            images = range_reads.read_images(locations)
        self._heartbeat()
        with self._progress.timer("write"):
            storage.write_bytes(uri, build_tar(images, rows.label[chosen].tolist(), layout.edges[tar]))
        self._progress.update(len(images), PurePosixPath(uri).name)


def _shard_list(pack_plan: PackPlan, sizes: dict[str, int]) -> bytes:
    """Return the tars and their labels as the JSON list of a labeled set."""
    lines = []
    for uri, tar in pack_plan.tars.items():
        shard = Shard(uri=uri, name=PurePosixPath(uri).name, kind="tar", size_bytes=sizes[uri], version="")
        labels = pack_plan.rows.label[pack_plan.layout.rows_in_tar(tar)].tolist()
        lines.append(json.dumps({"shard": shard.model_dump(), "labels": labels}).encode())
    return b"[" + b",\n".join(lines) + b"]"


def load_shards_by_name(plan: PlanReceipt) -> dict[str, Shard]:
    """Read the shards of the pool, by name.

    Cost:
        Memory: about 1 kB a shard.
    """
    groups = [ShardGroup.model_validate(group) for group in json.loads(storage.read_bytes(plan.units))]
    return {shard.name: shard for group in groups for shard in group.shards}


def source_versions(uris: pa.Array, shards: Collection[Shard]) -> pa.Array:
    """Return the version of each source object that was listed, and therefore scored.

    Args:
        uris: URIs of the selection's images.
        shards: All shards of the pool.

    Returns:
        One version per URI, for tars and loose files. It is "" for extracts, and for the images that a Parquet file
        links to, which are read without a version check.
    """
    listed = [(file.uri, file.version) for shard in shards for file in shard.files]
    listed += [(shard.uri, shard.version) for shard in shards if not shard.files]
    indexes = pc.index_in(uris, value_set=pa.array([uri for uri, _ in listed], uris.type))
    return pa.array([version for _, version in listed], pa.string()).take(indexes).fill_null("")


def build_tar(images: list[bytes], labels: list[int], start: int) -> bytes:
    """Return a tar of samples. Equal samples give equal bytes.

    Args:
        images: Encoded images.
        labels: Class index of each image.
        start: Number of the first sample.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=start):
            for suffix, data in (("cls", str(label).encode()), (range_reads.detect_extension(image), image)):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


__all__ = ["PackConfig", "pack"]
