"""What `plan` finds out by itself: sizes by listing, and speeds from a few hundred images on this machine."""

import hashlib
import time
from collections.abc import Callable, Iterator
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
PROBED_VIDEOS = 32  # a video takes as long as a hundred images
PROBED_SHARDS = 8
PROBED_OF_A_SHARD = PROBED_IMAGES // PROBED_SHARDS + 1
MEASURE_S = 2.0
BATCH = 16


@dataclass(frozen=True)
class ThroughputProbe:
    """What a few hundred images of the pool showed."""

    samples: int
    failed: int
    decode: Rate
    read: Rate


def measure_inputs(settings: RunConfig, classes: int) -> InputSizes:
    """List all sets, and count their images by the size of a few. Lists every object, reads a few MB.

    `classes` above 0 is the user's number. Raises InvalidInputError where a set is empty, or where nothing tells the
    classes.
    """
    columns = SampleFields(settings.image_column, "", settings.frames > 0)

    def found(name: str) -> SampleSetSize:
        return estimate_set_size(listing.list_shards(getattr(settings, name), columns.videos), columns)

    sets = {name: found(name) for name in ("labeled", "test", "unlabeled")}
    validation = found("validation") if settings.validation else SampleSetSize(0, 0, 0, 0)
    return InputSizes(**sets, validation=validation, classes=classes or count_classes(settings))


def count_classes(settings: RunConfig) -> int:
    """Count the classes by the list that the run file names, or by the class folders."""
    if settings.classes:
        return len(checkpoint_metadata.read_class_names(settings.classes, "classes"))
    names = {folder for uri in settings.labeled for folder in storage.list_dirs(uri) if not folder.startswith(".")}
    if len(names) < 2:
        raise InvalidInputError("classes: neither a list nor class folders tell how many there are; give --classes N")
    return len(names)


def estimate_set_size(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Return how many images there are, and how large and in how many objects they are stored."""
    of_kind = {kind: [shard for shard in shards if shard.kind == kind] for kind in ("files", "tar", "parquet")}
    parts = [
        size_of_files(of_kind["files"]),
        size_of_tars(of_kind["tar"], columns),
        size_of_parquet(of_kind["parquet"], columns),
    ]
    return SampleSetSize(*(sum(amounts) for amounts in zip(*map(astuple, parts), strict=True)))


def size_of_files(shards: list[Shard]) -> SampleSetSize:
    """Count loose files."""
    count = sum(len(shard.files) for shard in shards)
    return SampleSetSize(count, total_bytes(shards), count, len(shards))


def size_of_tars(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Count the images of tars by how densely a few of them are filled."""
    seen = size_bytes = 0
    for shard in sample_shards(shards):
        samples = read_first_samples(shard, columns)
        whole = len(samples) < PROBED_OF_A_SHARD
        seen += len(samples)
        size_bytes += shard.size_bytes if whole else max(sample.offset + len(sample.image) for sample in samples)
    return SampleSetSize(
        round(total_bytes(shards) * seen / max(size_bytes, 1)), total_bytes(shards), len(shards), len(shards)
    )


def size_of_parquet(shards: list[Shard], columns: SampleFields) -> SampleSetSize:
    """Count the images of Parquet files by the rows of a few. What they link is stored as loose files are."""
    few = sample_shards(shards)
    rows = sum(reader.estimate_sample_count(shard, columns) for shard in few)
    images = round(rows * total_bytes(shards) / max(total_bytes(few), 1))
    samples = [sample for shard in few for sample in read_first_samples(shard, columns)]
    linked = [len(sample.image) for sample in samples if sample.offset >= 0]
    links = round(images * len(linked) / max(len(samples), 1))
    linked_bytes = round(links * sum(linked) / max(len(linked), 1))
    return SampleSetSize(images, total_bytes(shards) + linked_bytes, len(shards) + links, len(shards))


def total_bytes(shards: list[Shard]) -> int:
    """Return the bytes of shards, as they are listed."""
    return sum(shard.size_bytes for shard in shards)


def read_first_samples(shard: Shard, columns: SampleFields) -> list[Sample]:
    """Read the first samples of a shard."""
    return list(islice(reader.iter_samples(shard, columns), PROBED_OF_A_SHARD))


def sample_shards(shards: list[Shard]) -> list[Shard]:
    """Return a few shards, by a hash of their names."""
    return sorted(shards, key=lambda shard: hashlib.blake2b(shard.name.encode()).digest())[:PROBED_SHARDS]


def measure_throughput(settings: RunConfig) -> ThroughputProbe:
    """Read and decode a few hundred images of the pool, one after the other: one core, one connection.

    Of videos a few dozen, each whole, as the scan decodes them; a training decodes one clip of each, in less time.
    """
    from semiscale.data.eval_transforms import eval_view  # imports torch, as below

    frames = settings.clip_frames("teacher")
    seen = Preprocessing(resolution=settings.resolution, augmentation=settings.augmentation, frames=frames)
    what = "videos" if settings.frames else "images"
    read_s = decode_s = 0.0
    size = samples = failed = 0
    started = time.perf_counter()
    for sample in first_samples(settings):
        read = time.perf_counter()
        read_s += read - started
        size, samples = size + len(sample.image), samples + 1
        try:
            eval_view(sample.image, seen)
        except DecodeError:
            failed += 1
        started = time.perf_counter()
        decode_s += started - read
    if samples == failed:
        raise InvalidInputError(f"unlabeled: none of {samples} {what} could be decoded; what do they hold?")
    return ThroughputProbe(
        samples,
        failed,
        Rate(samples / decode_s, f"measured here on {samples} {what}, one core"),
        Rate(size / read_s, f"measured here on {samples} {what}, one connection"),
    )


def first_samples(settings: RunConfig) -> Iterator[Sample]:
    """Yield the first samples of a few shards of the pool."""
    columns = SampleFields(settings.image_column, "", settings.frames > 0)
    shards = sample_shards(listing.list_shards(settings.unlabeled, columns.videos))
    count = -(-(PROBED_VIDEOS if columns.videos else PROBED_IMAGES) // len(shards))
    for shard in shards:
        yield from islice(reader.iter_samples(shard, columns), count)


def measure_device_rates(architecture: str, resolution: int, classes: int, frames: int = 0) -> dict[str, Rate]:
    """Measure an architecture's forward and training rates on this machine's device, a few seconds each.

    A video is trained on as one clip of so many frames, and measured as CLIPS of them.
    """
    import torch  # seconds to import; published or stated rates do without
    from torch.nn import functional as F

    from semiscale.models import checkpoint_io, networks

    checkpoint_io.configure_torch()
    device = checkpoint_io.default_device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    model = networks.build_model(architecture, classes).to(device)
    batch, time_axis = (1, [frames]) if frames else (BATCH, [])
    images_BCHW = torch.zeros(batch, 3, *time_axis, resolution, resolution, device=device)
    labels_B = torch.zeros(batch, dtype=torch.long, device=device)

    def forward() -> None:
        with torch.inference_mode():
            model(images_BCHW).sum().item()

    def train() -> None:
        loss = F.cross_entropy(model(images_BCHW), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()

    source = f"measured here: {where}"
    found = {"train": Rate(batch * calls_per_second(train), source)}
    model.eval()
    return {**found, "forward": Rate(batch * calls_per_second(forward) / (EVAL_CLIPS if frames else 1), source)}


def calls_per_second(batch: Callable[[], None]) -> float:
    """Return how often a second a function can be called, after one call to warm up."""
    batch()
    started = time.perf_counter()
    batches = 0
    while (elapsed := time.perf_counter() - started) < MEASURE_S:
        batch()
        batches += 1
    return batches / elapsed
