"""The labeled sets: every image decoded once, every label checked, the splits drawn and written down.

Memory grows with the labeled set (about 100 bytes an image), not with the pool. Time is one decode an image, on all
cores, once: the outcome is kept for each shard under its digest.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage
from semiscale.common.cpu import available_cpus
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError, TooManyBadSamplesError
from semiscale.data import listing, reader, video_decoding
from semiscale.data.image_decoding import decode_image, describe_decode_error
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import CONTAINER_SUFFIXES, Sample, SampleFields, Shard, media_suffixes
from semiscale.observability.progress import Progress
from semiscale.receipts.base import BadSample
from semiscale.storage.parquet import write_parquet

SAMPLES_PER_BATCH = 256  # decoded at a time: bounds memory
VIDEOS_PER_BATCH = 16  # a video has the bytes of many images


@dataclass(frozen=True)
class LabeledSample:
    """One labeled image: which shard (by position in the set's list), which sample of it, and its label as written."""

    shard: int
    index: int
    key: str
    label: str


@dataclass(frozen=True)
class LabeledSet:
    """A labeled set as found: its shards, its usable rows, and what failed."""

    name: str
    shards: list[Shard]
    rows: list[LabeledSample]
    failures: list[BadSample]

    def check_failure_rate(self, max_failed_fraction: float) -> None:
        """Raise TooManyBadSamplesError where too large a share of the set could not be used."""
        failed, listed = len(self.failures), len(self.failures) + len(self.rows)
        if failed > max_failed_fraction * listed:
            worst = self.failures[0]
            raise TooManyBadSamplesError(
                f"{self.name}: {failed} of {listed} samples failed, more than max_failed_fraction = "
                f"{max_failed_fraction:g} allows; the first: {worst.shard} {worst.key}: {worst.reason}"
            )


def validate_labeled_set(
    name: str, uris: list[str], columns: SampleFields, index_folder: str, progress: Progress
) -> LabeledSet:
    """Read and decode a labeled set. Samples that fail are listed with their reason, not raised."""
    shards = listing.list_shards(uris, columns.videos)
    check_class_folders(name, uris, columns.videos)
    rows: list[LabeledSample] = []
    failures: list[BadSample] = []
    for number, shard in enumerate(shards):
        for index, key, label, problem in _cached_validation(shard, columns, index_folder):
            progress.update(1, name)
            if problem:
                progress.add_failures(1)
                failures.append(BadSample(shard=shard.name, key=key, reason=problem))
            else:
                rows.append(LabeledSample(number, index, key, label))
    return LabeledSet(name, shards, rows, failures)


def check_class_folders(name: str, uris: list[str], videos: bool) -> None:
    """Raise InvalidInputError where a folder of class folders has one without an image, or a video."""
    for uri in uris:
        for folder in (name for name in storage.list_dirs(uri) if not name.startswith(".")):
            entries = storage.list_objects(storage.join(uri, folder))
            suffixes = (*media_suffixes(videos), *CONTAINER_SUFFIXES)
            if not any(entry.uri.lower().endswith(suffixes) for entry in entries):
                what = "video" if videos else "image"
                raise InvalidInputError(
                    f"{name}: class folder {storage.join(uri, folder)} has no {what}; add some or remove the folder"
                )


def write_split(found: LabeledSet, classes: list[str], folder: str) -> LabeledSplit:
    """Write a set's index and its shards' list to the workdir."""
    label_of = {name: number for number, name in enumerate(classes)}
    labels = [label_of[row.label] for row in found.rows]
    table = pa.table(
        {
            "shard": pa.array([row.shard for row in found.rows], pa.int32()),
            "index": pa.array([row.index for row in found.rows], pa.int32()),
            "key": pa.array([row.key for row in found.rows], pa.string()),
            "label": pa.array(labels, pa.int32()),
        }
    )
    identity = content_digest(
        [shard.digest() for shard in found.shards], [(row.shard, row.index, row.label) for row in found.rows]
    )
    index = storage.join(folder, f"{found.name}.parquet")
    shards = storage.join(folder, f"{found.name}-shards.json")
    write_parquet(table, index)
    storage.write_bytes(shards, json.dumps([shard.model_dump() for shard in found.shards]).encode())
    counts = Counter(labels)
    return LabeledSplit(
        digest=identity,
        index=index,
        shards=shards,
        samples=len(labels),
        class_counts=[counts[number] for number in range(len(classes))],
    )


def stratified_split(labeled: LabeledSet, fraction: float, seed: int) -> tuple[LabeledSet, LabeledSet]:
    """Split a labeled set into training and validation, stratified: the same share of every class, at least one image.

    Which images is decided by a hash of seed, shard and key, so that it survives a change of order. Raises
    InvalidInputError
    where a class has a single image.
    """
    by_class: dict[str, list[LabeledSample]] = {}
    for row in labeled.rows:
        by_class.setdefault(row.label, []).append(row)
    held: set[tuple[int, int]] = set()
    for label, rows in by_class.items():
        if len(rows) < 2:
            raise InvalidInputError(
                f"labeled: class {label!r} has a single image, so none can be held out for validation; "
                "add images or set validation"
            )
        rows.sort(key=lambda row: content_digest(seed, labeled.shards[row.shard].name, row.key))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held.update((row.shard, row.index) for row in rows[:count])
    inside = [row for row in labeled.rows if (row.shard, row.index) in held]
    outside = [row for row in labeled.rows if (row.shard, row.index) not in held]
    return replace(labeled, name="train", rows=outside), replace(labeled, name="validation", rows=inside, failures=[])


def _cached_validation(shard: Shard, columns: SampleFields, index_folder: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (index, key, label, problem) of a shard's samples, from the kept outcome where there is one."""
    kind = ["videos"] if columns.videos else []
    uri = storage.join(index_folder, f"{content_digest(shard.digest(), columns.image, columns.label, *kind)}.parquet")
    kept = storage.read_or_none(uri)
    if kept is None:
        rows = list(_decoded(shard, columns))
        names = ("index", "key", "label", "problem")
        table = pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))) if rows else pa.table({})
        write_parquet(table, uri)
    else:
        rows = [tuple(row.values()) for row in pq.read_table(io.BytesIO(kept)).to_pylist()]
    yield from rows


def _decoded(shard: Shard, columns: SampleFields) -> Iterator[tuple[int, str, str, str]]:
    samples = reader.iter_samples(shard, columns, ahead=True)
    look, together = (
        (video_decoding.check_decodable, VIDEOS_PER_BATCH) if columns.videos else (decode_image, SAMPLES_PER_BATCH)
    )
    with ThreadPoolExecutor(available_cpus()) as pool:
        while batch := list(islice(samples, together)):
            yield from pool.map(partial(_validate_sample, look), batch)


def _validate_sample(look: Callable[[bytes], object], sample: Sample) -> tuple[int, str, str, str]:
    problem = sample.problem
    if not problem:
        try:
            look(sample.image)
        except Exception as error:  # noqa: BLE001 - one image must not end the plan
            problem = describe_decode_error(error, f"{sample.uri}: {sample.key}")
    if not problem and sample.label is None:
        problem = "no label"
    return sample.index, sample.key, sample.label or "", problem
