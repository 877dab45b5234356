"""What a run will take, by arithmetic: hours, device-hours, requests, bytes and money of each stage.

A stage's speed is that of its slowest part: the device, decoding on the CPUs beside it, or reading. Nothing here reads
or measures; the figures can be added up by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from semiscale.cli.rates import RateOverrides
from semiscale.config.run_config import RunConfig
from semiscale.data.labeled import SHUFFLE_BUFFER_BYTES
from semiscale.stages.score.score_store import MIN_KEPT_CLASSES
from semiscale.storage.base import READ_CHUNK_BYTES

ROW_BYTES = 10.3  # of the scores, for each image and class: measured on 10^9 rows
SAMPLE_BYTES = 40.0  # of the table of samples, for each image
SELECTION_BYTES = 60.0  # of a row of the selection
MERGE_S_PER_ROW = 1.2e-9  # CPU-seconds: 11.6 for 10^10 rows, on one core
SAMPLES_PER_TAR = 10_000
LISTED_AT_A_TIME = 1_000
HOUR_S = 3600.0
GB = 1e9


@dataclass(frozen=True)
class SampleSetSize:
    """A set of images at rest: what a listing says, and how many images that is."""

    images: int
    size_bytes: int
    objects: int
    shards: int

    @property
    def image_bytes(self) -> float:
        """Return the mean size of an image."""
        return self.size_bytes / max(self.images, 1)

    @property
    def reads(self) -> int:
        """Return the requests that it takes to read it all: loose files one by one, the rest in large ranges."""
        return max(self.objects, ceil(self.size_bytes / READ_CHUNK_BYTES))


@dataclass(frozen=True)
class InputSizes:
    """What a run works on. `labeled` includes what will be held out."""

    labeled: SampleSetSize
    test: SampleSetSize
    validation: SampleSetSize
    unlabeled: SampleSetSize
    classes: int


@dataclass(frozen=True)
class StageCost:
    """What one stage takes. `hours` are on the clock, with its pods or learning rates side by side."""

    name: str
    hours: float = 0.0
    device_hours: float = 0.0
    cpu_hours: float = 0.0
    reads: int = 0
    writes: int = 0
    read_bytes: float = 0.0
    kept_bytes: float = 0.0
    bound_by: str = ""

    def cost(self, stated: RateOverrides) -> float:
        """Return its price: computing, requests, and a month of what it leaves."""
        computing = self.device_hours * stated.gpu_price_per_h + self.cpu_hours * stated.cpu_price_per_h
        requests = self.reads * stated.read_price_per_1000 + self.writes * stated.write_price_per_1000
        return computing + requests / 1000 + self.kept_bytes / GB * stated.storage_price_per_gb_month


@dataclass(frozen=True)
class RunCost:
    """All stages of a run, in the pipeline's order."""

    stages: list[StageCost]
    selected: int
    cpus_per_device: float  # that decode as fast as the teacher scores

    @property
    def hours(self) -> float:
        """Return the hours on the clock: the baseline trains beside the rest."""
        hours = {stage.name: stage.hours for stage in self.stages}
        ends = hours["plan"] + hours["evaluate"]
        return ends + max(hours["baseline"], sum(hours.values()) - ends - hours["baseline"])

    @property
    def device_hours(self) -> float:
        """Return the device-hours of all stages."""
        return sum(stage.device_hours for stage in self.stages)

    def cost(self, stated: RateOverrides) -> float:
        """Return the price of all stages."""
        return sum(stage.cost(stated) for stage in self.stages)


def estimate_run(settings: RunConfig, inputs: InputSizes, rates: Mapping[str, float], stated: RateOverrides) -> RunCost:
    """Estimate a run. `rates` has every rate of Stated that is measured or published."""
    run = _CostModel(settings, inputs, rates, stated)
    stages = [
        run.plan(),
        run.training("teacher", settings.teacher_images_processed),
        run.score(),
        run.merge(),
        run.pack(),
        run.training("pretrain", settings.pretrain_images_processed),
        run.training("finetune", settings.finetune_epochs * run.train_images, len(settings.finetune_learning_rates)),
        run.training(
            "baseline",
            settings.pretrain_images_processed + settings.finetune_epochs * run.train_images,
            len(settings.baseline_learning_rates),
        ),
        run.evaluate(),
    ]
    ratio = rates["teacher_forward_images_per_s"] / rates["decode_images_per_s"]
    return RunCost(stages, run.selected.images, ratio)


class _CostModel:
    """The numbers that several stages need."""

    def __init__(
        self, settings: RunConfig, inputs: InputSizes, rates: Mapping[str, float], stated: RateOverrides
    ) -> None:
        self._settings, self._inputs, self._rates, self._stated = settings, inputs, rates, stated
        held_out = 0 if settings.validation else settings.validation_fraction
        self.train_images = round(inputs.labeled.images * (1 - held_out))
        pool = inputs.unlabeled
        classes_per_image = min(settings.classes_per_image, inputs.classes)
        count = min(settings.images_per_class * inputs.classes, pool.images * classes_per_image)
        tars = ceil(count / SAMPLES_PER_TAR)
        self.selected = SampleSetSize(count, round(count * pool.image_bytes), tars, tars)
        self._rows = pool.images * min(max(settings.classes_per_image, MIN_KEPT_CLASSES), inputs.classes)

    def plan(self) -> StageCost:
        """List everything, decode the labeled sets once."""
        sets = (self._inputs.labeled, self._inputs.validation, self._inputs.test)
        speed, bound_by = self._slowest(
            {}, sum(one.size_bytes for one in sets) / max(sum(one.images for one in sets), 1)
        )
        hours = sum(one.images for one in sets) / speed / HOUR_S
        lists = sum(ceil(one.objects / LISTED_AT_A_TIME) for one in (*sets, self._inputs.unlabeled))
        return StageCost(
            "plan",
            hours,
            cpu_hours=hours * self._stated.cpus_per_device,
            reads=sum(one.reads for one in sets),
            writes=lists + sum(one.shards for one in sets),
            read_bytes=sum(one.size_bytes for one in sets),
            bound_by=bound_by,
        )

    def score(self) -> StageCost:
        """Read, decode and score every image of the pool once, on all pods."""
        pool = self._inputs.unlabeled
        device = {"the device": self._rates["teacher_forward_images_per_s"]}
        speed, bound_by = self._slowest(device, pool.image_bytes)
        device_hours = pool.images / speed / HOUR_S
        return StageCost(
            "score",
            device_hours / min(self._settings.pods, max(pool.shards, 1)),
            device_hours,
            reads=pool.reads + pool.shards,
            writes=3 * pool.shards,  # a claim, the shard's scores, its share of the unit's files
            read_bytes=pool.size_bytes,
            kept_bytes=self._rows * ROW_BYTES + pool.images * SAMPLE_BYTES,
            bound_by=bound_by,
        )

    def merge(self) -> StageCost:
        """Read the winners' bands."""
        hours = self._rows * MERGE_S_PER_ROW / HOUR_S
        read_bytes = 3 * self.selected.images * (ROW_BYTES + SAMPLE_BYTES)
        reads = ceil(read_bytes / READ_CHUNK_BYTES) + 3 * min(self._inputs.unlabeled.shards, 1000)
        kept = self.selected.images * SELECTION_BYTES
        return StageCost("merge", hours, 0.0, hours, reads, 3, read_bytes, kept, "the CPU")

    def pack(self) -> StageCost:
        """Copy the selected images, one ranged request each."""
        size = self.selected.size_bytes
        hours = size / self._rates["read_bytes_per_s"] / HOUR_S
        cpu_hours = hours * self._stated.cpus_per_device
        return StageCost(
            "pack", hours, 0.0, cpu_hours, self.selected.images, self.selected.shards + 2, size, size, "reading"
        )

    def training(self, recipe: str, images: int, times: int = 1) -> StageCost:
        """Train for so many images, once for each learning rate, side by side.

        A set that fits in memory is read once by every device, a larger one in every epoch by all of them together.
        """
        source = self.selected if recipe == "pretrain" else self._inputs.labeled
        model = "teacher" if recipe == "teacher" else "student"
        devices = self._stated.training_devices
        passes = devices if source.size_bytes <= SHUFFLE_BUFFER_BYTES else images / max(source.images, 1)
        device = {"the device": self._rates[f"{model}_train_images_per_s"]}
        speed, bound_by = self._slowest(device, source.image_bytes * passes * source.images / max(images, 1))
        device_hours = images / speed / HOUR_S
        hours = device_hours / devices
        return StageCost(
            recipe,
            hours,
            device_hours * times,
            reads=ceil(source.reads * passes) * times,
            writes=ceil(hours * 6 + 3) * times,  # a checkpoint each ten minutes
            read_bytes=source.size_bytes * passes * times,
            bound_by=bound_by,
        )

    def evaluate(self) -> StageCost:
        """Forward the test images through four models; they are read once, or twice for clips of two lengths."""
        test = self._inputs.test
        models = {"teacher": 1, "student": 3}
        times_read = len({self._settings.clip_frames(model) for model in models})
        hours = 0.0
        for model, times in models.items():
            device = {"the device": self._rates[f"{model}_forward_images_per_s"]}
            speed, bound_by = self._slowest(device, test.image_bytes)
            hours += times * test.images / speed / HOUR_S
        reads, read_bytes = times_read * test.reads, times_read * test.size_bytes
        return StageCost("evaluate", hours, hours, 0.0, reads, 3, read_bytes, 0.0, bound_by)

    def _slowest(self, limits: dict[str, float], image_bytes: float) -> tuple[float, str]:
        """Return images a second of one device and the CPUs beside it, and what bounds them."""
        limits = {
            **limits,
            "decoding": self._rates["decode_images_per_s"] * self._stated.cpus_per_device,
            "reading": self._rates["read_bytes_per_s"] / max(image_bytes, 1e-9),
        }
        bound_by = min(limits, key=lambda part: limits[part])
        return limits[bound_by], bound_by
