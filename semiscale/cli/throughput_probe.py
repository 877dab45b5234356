"""Measurements for the verb `plan`: sizes by listing, and rates from a few hundred images on this machine."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice

from semiscale import storage
from semiscale.cli.cost_model import InputSizes, SampleSetSize
from semiscale.cli.rates import Rate
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_config import RunConfig
from semiscale.data import listing, reader
from semiscale.data.image_decoding import DecodeError
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import Sample, SampleFields, Shard
from semiscale.data.video_decoding import EVAL_CLIPS
from semiscale.models import checkpoint_metadata

PROBED_IMAGES = 320
# A video takes as long as a hundred images.
PROBED_VIDEOS = 32
PROBED_SHARDS = 8
MEASURE_DURATION_S = 2.0
BATCH_SIZE = 16


@dataclass(frozen=True)
class ThroughputProbe:
    """The rates that a few hundred images of the pool gave.

    Attributes:
        samples: Samples that were read.
        failed: Samples of them that could not be decoded.
        decode: Samples per second on one core.
        read: Bytes per second on one connection.
    """

    samples: int
    failed: int
    decode: Rate
    read: Rate


def measure_inputs(settings: RunConfig, classes: int) -> InputSizes:
    """List all sets of a run and estimate their numbers of images.

    Args:
        settings: The run file.
        classes: Number of classes. 0: count them in the list or in the class folders.

    Raises:
        InvalidInputError: A set is empty, or the number of classes is unknown.

    Cost:
        A listing of every object. A few megabytes are read.
    """
    columns = SampleFields(settings.image_column, "", settings.frames > 0)

    def measure_set(name: str) -> SampleSetSize:
        return estimate_set_size(listing.list_shards(getattr(settings, name), columns.videos), columns)

    sets = {name: measure_set(name) for name in ("labeled", "test", "unlabeled")}
    validation = measure_set("validation") if settings.validation else SampleSetSize(0, 0, 0, 0)
    return InputSizes(**sets, validation=validation, classes=classes or count_classes(settings))


def count_classes(settings: RunConfig) -> int:
    """Count the classes in the list of the run file, or in the class folders.

    Raises:
        InvalidInputError: There is neither a list nor two class folders.
    """
    if settings.classes:
        return len(checkpoint_metadata.read_class_names(settings.classes, "classes"))
    names = {folder for uri in settings.labeled for folder in storage.list_dirs(uri) if not folder.startswith(".")}
    if len(names) < 2:
        raise InvalidInputError(
            "SEMI-E437", "classes: There is neither a list of classes nor class folders. Give --classes N."
        )
    return len(names)


def estimate_set_size(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Estimate the images, bytes and objects of a set.

    Args:
        shards: The listed shards of the set.
        columns: Fields of a sample to read.
    """
    by_kind = {kind: [shard for shard in shards if shard.kind == kind] for kind in ("files", "tar", "parquet")}
    parts = [
        size_of_files(by_kind["files"]),
        size_of_tars(by_kind["tar"], columns),
        size_of_parquet(by_kind["parquet"], columns),
    ]
    return SampleSetSize(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))


def size_of_files(shards: list[Shard]) -> SampleSetSize:
    """Return the size of a set of loose files."""
    count = sum(len(shard.files) for shard in shards)
    return SampleSetSize(count, total_bytes(shards), count, len(shards))


def size_of_tars(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Estimate the images of tars from the bytes per sample in a few of them."""
    sample_count = size_bytes = 0
    probed = sample_shards(shards)
    # A set of few images is read whole, so its number is exact.
    limit = PROBED_IMAGES // max(len(probed), 1) + 1
    for shard in probed:
        samples = read_first_samples(shard, columns, limit)
        is_whole_shard = len(samples) < limit
        sample_count += len(samples)
        size_bytes += (
            shard.size_bytes if is_whole_shard else max(sample.offset + len(sample.image) for sample in samples)
        )
    return SampleSetSize(
        round(total_bytes(shards) * sample_count / max(size_bytes, 1)), total_bytes(shards), len(shards), len(shards)
    )


def size_of_parquet(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Estimate the images of Parquet files from the rows of a few of them.

    An image that a row links is stored as a loose file.
    """
    probed = sample_shards(shards)
    rows = sum(reader.estimate_sample_count(shard, columns) for shard in probed)
    images = round(rows * total_bytes(shards) / max(total_bytes(probed), 1))
    limit = PROBED_IMAGES // PROBED_SHARDS + 1
    samples = [sample for shard in probed for sample in read_first_samples(shard, columns, limit)]
    linked_sizes = [len(sample.image) for sample in samples if sample.offset >= 0]
    links = round(images * len(linked_sizes) / max(len(samples), 1))
    linked_bytes = round(links * sum(linked_sizes) / max(len(linked_sizes), 1))
    return SampleSetSize(images, total_bytes(shards) + linked_bytes, len(shards) + links, len(shards))


def total_bytes(shards: list[Shard]) -> int:
    """Return the listed bytes of shards."""
    return sum(shard.size_bytes for shard in shards)


def read_first_samples(shard: Shard, columns: SampleFields, limit: int) -> list[Sample]:
    """Read the first samples of a shard, at most `limit` of them."""
    return list(islice(reader.iter_samples(shard, columns), limit))


def sample_shards(shards: list[Shard]) -> list[Shard]:
    """Return a few shards, chosen by a hash of their names."""
    return sorted(shards, key=lambda shard: hashlib.blake2b(shard.name.encode()).digest())[:PROBED_SHARDS]


def require_torch(rates: Sequence[str]) -> None:
    """Check that this machine can measure rates, for which torch is needed.

    Args:
        rates: Names of the rates that are neither stated nor published.

    Raises:
        InvalidInputError: Torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        options = ", ".join(f"--{rate.replace('_', '-')}" for rate in rates)
        raise InvalidInputError(
            "SEMI-E445",
            f"plan: Rates are measured with torch, which is not installed. Give {options}, or install torch with "
            "`pip install . -r requirements/cuda.in`.",
        ) from None


def measure_throughput(settings: RunConfig) -> ThroughputProbe:
    """Read and decode a few hundred images of the pool on one core and one connection.

    Of videos, a few dozen are decoded whole, as in the scan. A training decodes one clip of each in less time.

    Raises:
        InvalidInputError: No sample can be decoded.
    """
    # The module imports torch, which takes seconds.
    from semiscale.data.eval_transforms import eval_view

    frames = settings.clip_frames("teacher")
    preprocessing = Preprocessing(resolution=settings.resolution, augmentation=settings.augmentation, frames=frames)
    kind = "videos" if settings.frames else "images"
    read_s = decode_s = 0.0
    size = samples = failed = 0
    started = time.perf_counter()
    for sample in first_samples(settings):
        read_end = time.perf_counter()
        read_s += read_end - started
        size, samples = size + len(sample.image), samples + 1
        try:
            eval_view(sample.image, preprocessing)
        except DecodeError:
            failed += 1
        started = time.perf_counter()
        decode_s += started - read_end
    if samples == failed:
        raise InvalidInputError(
            "SEMI-E438", f"unlabeled: None of {samples} {kind} can be decoded. Check the format of the files."
        )
    return ThroughputProbe(
        samples,
        failed,
        Rate(samples / decode_s, f"measured here on {samples} {kind}, one core"),
        Rate(size / read_s, f"measured here on {samples} {kind}, one connection"),
    )


def first_samples(settings: RunConfig) -> Iterator[Sample]:
    """Yield the first samples of a few shards of the pool."""
    columns = SampleFields(settings.image_column, "", settings.frames > 0)
    shards = sample_shards(listing.list_shards(settings.unlabeled, columns.videos))
    count = -(-(PROBED_VIDEOS if columns.videos else PROBED_IMAGES) // len(shards))
    for shard in shards:
        yield from islice(reader.iter_samples(shard, columns), count)


def measure_device_rates(architecture: str, resolution: int, classes: int, frames: int = 0) -> dict[str, Rate]:
    """Measure the forward and the training rate of a network for a few seconds each.

    A training uses one clip of a video. The forward rate is that of EVAL_CLIPS clips for each video.

    Args:
        architecture: Name of the architecture.
        resolution: Height and width in pixels.
        classes: Outputs of the network.
        frames: Frames of a clip. 0: the samples are images.

    Returns:
        Samples per second of the device of this machine, by `forward` and `train`.
    """
    # torch takes seconds to import. Published and stated rates do not need it.
    import torch
    from torch.nn import functional as F

    from semiscale.models import checkpoint_io, networks

    checkpoint_io.configure_torch()
    device = checkpoint_io.default_device()
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    model = networks.build_model(architecture, classes).to(device)
    batch_size, time_axis = (1, [frames]) if frames else (BATCH_SIZE, [])
    images_BCHW = torch.zeros(batch_size, 3, *time_axis, resolution, resolution, device=device)
    labels_B = torch.zeros(batch_size, dtype=torch.long, device=device)

    def forward() -> None:
        with torch.inference_mode():
            model(images_BCHW).sum().item()

    def train() -> None:
        loss = F.cross_entropy(model(images_BCHW), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()

    source = f"measured here: {device_name}"
    train_rate = {"train": Rate(batch_size * calls_per_second(train), source, device_name)}
    model.eval()
    return {
        **train_rate,
        "forward": Rate(batch_size * calls_per_second(forward) / (EVAL_CLIPS if frames else 1), source, device_name),
    }


def calls_per_second(function: Callable[[], None]) -> float:
    """Return the calls per second of a function, after one call to warm up."""
    function()
    started = time.perf_counter()
    calls = 0
    while (elapsed := time.perf_counter() - started) < MEASURE_DURATION_S:
        function()
        calls += 1
    return calls / elapsed
