"""Validate the labeled sets: decode every image, check every label, write the splits.

Each shard's outcome is cached under the digest of the shard, so every image is decoded once.

Cost:
    Memory grows with the labeled set, by about 100 bytes an image, and not with the pool. Time is one decode an image,
    on all cores.
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

# Samples that are decoded together. The batch size bounds memory.
SAMPLES_PER_BATCH = 256
# A video has the bytes of many images.
VIDEOS_PER_BATCH = 16

NO_LABEL = "no label"
VALIDATION_COLUMNS = ("index", "key", "label", "problem")


@dataclass(frozen=True)
class LabeledSample:
    """One labeled image.

    Attributes:
        shard: Position of its shard in the list of the set.
        index: Position of the sample in its shard.
        key: Key of the sample.
        label: The label as written.
    """

    shard: int
    index: int
    key: str
    label: str


@dataclass(frozen=True)
class LabeledSet:
    """A labeled set.

    Attributes:
        name: `labeled`, `validation`, `test`, or `train` for what a split leaves.
        shards: The shards of the set.
        rows: The usable samples.
        failures: The unusable samples and their reasons.
    """

    name: str
    shards: list[Shard]
    rows: list[LabeledSample]
    failures: list[BadSample]

    def check_failure_rate(self, max_failed_fraction: float) -> None:
        """Check that the share of unusable samples is within the limit.

        Args:
            max_failed_fraction: Largest share of unusable samples, in [0, 1].

        Raises:
            TooManyBadSamplesError: If the share is larger.
        """
        failed, listed = len(self.failures), len(self.failures) + len(self.rows)
        if failed > max_failed_fraction * listed:
            first = self.failures[0]
            cure = "Repair or remove the samples, or raise max_failed_fraction."
            if all(failure.reason == NO_LABEL for failure in self.failures):
                # A common mistake is a URI of one class folder, whose images lie in no folder of their own.
                cure = "Give a URI whose images have labels, for example the folder above as in URI/CLASS/*.jpg."
            raise TooManyBadSamplesError(
                "SEMI-E203",
                f"{self.name}: {failed} of {listed} samples failed, more than max_failed_fraction = "
                f"{max_failed_fraction:g} allows. The first is {first.location()} ({first.reason}). {cure}",
            )


def validate_labeled_set(
    name: str, uris: list[str], columns: SampleFields, cache_folder: str, progress: Progress
) -> LabeledSet:
    """Read and decode every sample of a labeled set.

    Args:
        name: Name of the set, which begins every error.
        uris: URIs of the set.
        columns: Columns of images and labels in Parquet files, and whether the samples are videos.
        cache_folder: Folder of the cached outcomes.
        progress: Counts the samples and the failures.

    Returns:
        The set. Unusable samples are in `failures` with their reasons.

    Raises:
        InvalidInputError: If a URI holds no samples, or a class folder is empty.
    """
    shards = listing.list_shards(uris, columns.videos)
    check_class_folders(name, uris, columns.videos)
    rows: list[LabeledSample] = []
    failures: list[BadSample] = []
    for shard_number, shard in enumerate(shards):
        for index, key, label, problem in _validate_shard(shard, columns, cache_folder):
            progress.update(1, name)
            if problem:
                progress.add_failures(1)
                failures.append(BadSample(shard=shard.name, key=key, reason=problem))
            else:
                rows.append(LabeledSample(shard_number, index, key, label))
    return LabeledSet(name, shards, rows, failures)


def check_class_folders(name: str, uris: list[str], videos: bool) -> None:
    """Check that every class folder has a sample.

    Args:
        name: Name of the set.
        uris: URIs of the set. Their subfolders are class folders, except hidden ones.
        videos: Whether the samples are videos.

    Raises:
        InvalidInputError: If a class folder has no image, or no video.
    """
    suffixes = (*media_suffixes(videos), *CONTAINER_SUFFIXES)
    medium = "video" if videos else "image"
    for uri in uris:
        for folder in storage.list_dirs(uri):
            if folder.startswith("."):
                continue
            folder_uri = storage.join(uri, folder)
            if not any(entry.uri.lower().endswith(suffixes) for entry in storage.list_objects(folder_uri)):
                raise InvalidInputError(
                    "SEMI-E204", f"{name}: class folder {folder_uri} has no {medium}. Add some or remove the folder."
                )


def write_split(labeled: LabeledSet, classes: list[str], folder: str) -> LabeledSplit:
    """Write the index of a set and the list of its shards.

    Args:
        labeled: The set, whose labels are names of classes.
        classes: Class names in label order.
        folder: URI of the folder to write to.

    Returns:
        The split, as the plan's receipt names it.
    """
    number_of_class = {name: number for number, name in enumerate(classes)}
    labels = [number_of_class[row.label] for row in labeled.rows]
    table = pa.table(
        {
            "shard": pa.array([row.shard for row in labeled.rows], pa.int32()),
            "index": pa.array([row.index for row in labeled.rows], pa.int32()),
            "key": pa.array([row.key for row in labeled.rows], pa.string()),
            "label": pa.array(labels, pa.int32()),
        }
    )
    digest = content_digest(
        [shard.digest() for shard in labeled.shards], [(row.shard, row.index, row.label) for row in labeled.rows]
    )
    index_uri = storage.join(folder, f"{labeled.name}.parquet")
    shards_uri = storage.join(folder, f"{labeled.name}-shards.json")
    write_parquet(table, index_uri)
    storage.write_bytes(shards_uri, json.dumps([shard.model_dump() for shard in labeled.shards]).encode())
    counts = Counter(labels)
    return LabeledSplit(
        digest=digest,
        index=index_uri,
        shards=shards_uri,
        samples=len(labels),
        class_counts=[counts[number] for number in range(len(classes))],
    )


def stratified_split(labeled: LabeledSet, fraction: float, seed: int) -> tuple[LabeledSet, LabeledSet]:
    """Split a labeled set into training and validation, the same share of each class.

    A hash of seed, shard and key decides which images are held out, so the split survives a change of order.

    Args:
        labeled: The set to split.
        fraction: Share of every class that is held out, in (0, 1). At least one image is.
        seed: Seed of the run.

    Returns:
        The training and the validation set.

    Raises:
        InvalidInputError: If a class has a single image.
    """
    rows_by_class: dict[str, list[LabeledSample]] = {}
    for row in labeled.rows:
        rows_by_class.setdefault(row.label, []).append(row)
    held_out: set[tuple[int, int]] = set()
    for label, rows in rows_by_class.items():
        if len(rows) < 2:
            raise InvalidInputError(
                "SEMI-E205",
                f"labeled: class {label!r} has a single image, so none can be held out for validation. "
                "Add images or set validation.",
            )
        rows.sort(key=lambda row: content_digest(seed, labeled.shards[row.shard].name, row.key))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out.update((row.shard, row.index) for row in rows[:count])
    validation_rows = [row for row in labeled.rows if (row.shard, row.index) in held_out]
    train_rows = [row for row in labeled.rows if (row.shard, row.index) not in held_out]
    return (
        replace(labeled, name="train", rows=train_rows),
        replace(labeled, name="validation", rows=validation_rows, failures=[]),
    )


def _validate_shard(shard: Shard, columns: SampleFields, cache_folder: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (index, key, label, problem) of a shard's samples, from the cache if possible."""
    medium = ["videos"] if columns.videos else []
    cache_key = content_digest(shard.digest(), columns.image, columns.label, *medium)
    uri = storage.join(cache_folder, f"{cache_key}.parquet")
    cached = storage.read_or_none(uri)
    if cached is None:
        rows = list(_decode_shard(shard, columns))
        table = pa.table(dict(zip(VALIDATION_COLUMNS, zip(*rows, strict=True), strict=True))) if rows else pa.table({})
        write_parquet(table, uri)
    else:
        rows = [tuple(row.values()) for row in pq.read_table(io.BytesIO(cached)).to_pylist()]
    yield from rows


def _decode_shard(shard: Shard, columns: SampleFields) -> Iterator[tuple[int, str, str, str]]:
    samples = reader.iter_samples(shard, columns, prefetch=True)
    decode: Callable[[bytes], object] = video_decoding.check_decodable if columns.videos else decode_image
    batch_size = VIDEOS_PER_BATCH if columns.videos else SAMPLES_PER_BATCH
    with ThreadPoolExecutor(available_cpus()) as pool:
        while batch := list(islice(samples, batch_size)):
            yield from pool.map(partial(_validate_sample, decode), batch)


def _validate_sample(decode: Callable[[bytes], object], sample: Sample) -> tuple[int, str, str, str]:
    problem = sample.problem
    if not problem:
        try:
            decode(sample.image)
        except Exception as error:  # noqa: BLE001 - one image must not end the plan
            problem = describe_decode_error(error, f"{sample.uri}: {sample.key}")
    if not problem and sample.label is None:
        problem = NO_LABEL
    return sample.index, sample.key, sample.label or "", problem
