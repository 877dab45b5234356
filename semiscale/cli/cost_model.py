"""The cost model of a run: hours, device-hours, requests, bytes and money of each stage.

The speed of a stage is that of its slowest part: the device, decoding on the CPUs of its machine, or reading. This
module is arithmetic alone. It reads and measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from semiscale.cli.rates import RateOverrides
from semiscale.config.run_config import RunConfig
from semiscale.data.labeled import SHUFFLE_BUFFER_BYTES
from semiscale.stages.score.score_store import MIN_KEPT_CLASSES
from semiscale.storage.base import READ_CHUNK_BYTES

# A row of the score files, for one image and class: measured on 10^9 rows.
SCORE_ROW_BYTES = 10.3
# A row of the table of samples, for one image.
SAMPLE_ROW_BYTES = 40.0
SELECTION_ROW_BYTES = 60.0
# CPU-seconds: 11.6 for 10^10 rows on one core.
MERGE_S_PER_ROW = 1.2e-9
SAMPLES_PER_TAR = 10_000
OBJECTS_PER_LIST_REQUEST = 1_000
HOUR_S = 3600.0
GB = 1e9


@dataclass(frozen=True)
class SampleSetSize:
    """The size of a stored set: its listing and its number of images."""

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
        """Return the requests that read the whole set.

        A loose file takes one request, and a shard takes one for each READ_CHUNK_BYTES.
        """
        return max(self.objects, ceil(self.size_bytes / READ_CHUNK_BYTES))


@dataclass(frozen=True)
class InputSizes:
    """The sizes of the inputs of a run; `labeled` includes held-out images."""

    labeled: SampleSetSize
    test: SampleSetSize
    validation: SampleSetSize
    unlabeled: SampleSetSize
    classes: int


@dataclass(frozen=True)
class StageCost:
    """The estimate of one stage.

    `hours` is elapsed time. The pods and the learning rates of a stage run in parallel.
    """

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
        """Return the price of computing, of requests and of one month of storage."""
        computing = self.device_hours * stated.gpu_price_per_h + self.cpu_hours * stated.cpu_price_per_h
        requests = self.reads * stated.read_price_per_1000 + self.writes * stated.write_price_per_1000
        return computing + requests / 1000 + self.kept_bytes / GB * stated.storage_price_per_gb_month


@dataclass(frozen=True)
class RunCost:
    """The estimate of a run.

    Attributes:
        stages: The stages in the order of the pipeline.
        selected: Images in the selection, at most.
        is_pool_short: Whether the pool is too small to give every class K images.
        cpus_per_device: CPU cores that decode as fast as the teacher scores on one device.
    """

    stages: list[StageCost]
    selected: int
    is_pool_short: bool
    cpus_per_device: float

    @property
    def hours(self) -> float:
        """Return the elapsed hours; the baseline trains in parallel to the rest."""
        hours = {stage.name: stage.hours for stage in self.stages}
        sequential = hours["plan"] + hours["evaluate"]
        return sequential + max(hours["baseline"], sum(hours.values()) - sequential - hours["baseline"])

    @property
    def device_hours(self) -> float:
        """Return the device-hours of all stages."""
        return sum(stage.device_hours for stage in self.stages)

    def cost(self, stated: RateOverrides) -> float:
        """Return the price of all stages."""
        return sum(stage.cost(stated) for stage in self.stages)


def estimate_run(settings: RunConfig, inputs: InputSizes, rates: Mapping[str, float], stated: RateOverrides) -> RunCost:
    """Estimate the stages of a run.

    Args:
        settings: The run file.
        inputs: Sizes of its inputs.
        rates: Every rate of MEASURABLE_RATES, by its name.
        stated: Prices, devices and cores that the user stated.
    """
    model = _CostModel(settings, inputs, rates, stated)
    stages = [
        model.plan(),
        # A ready-made teacher is checked on at most a thousand images and not trained.
        StageCost("teacher")
        if settings.teacher_checkpoint
        else model.training("teacher", settings.teacher_images_processed),
        model.score(),
        model.merge(),
        model.pack(),
        model.training("pretrain", settings.pretrain_images_processed),
        model.training(
            "finetune", settings.finetune_epochs * model.train_images, len(settings.finetune_learning_rates)
        ),
        model.training(
            "baseline",
            settings.pretrain_images_processed + settings.finetune_epochs * model.train_images,
            len(settings.baseline_learning_rates),
        ),
        model.evaluate(),
    ]
    ratio = rates["teacher_forward_images_per_s"] / rates["decode_images_per_s"]
    is_pool_short = model.selected.images < settings.images_per_class * inputs.classes
    return RunCost(stages, model.selected.images, is_pool_short, ratio)


class _CostModel:
    """The estimate of each stage, from numbers that several stages share."""

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
        """Estimate the listing of all sets and one decoding of the labeled sets."""
        sets = (self._inputs.labeled, self._inputs.validation, self._inputs.test)
        speed, bound_by = self._find_bottleneck(
            {},
            sum(labeled_set.size_bytes for labeled_set in sets)
            / max(sum(labeled_set.images for labeled_set in sets), 1),
        )
        hours = sum(labeled_set.images for labeled_set in sets) / speed / HOUR_S
        lists = sum(ceil(listed.objects / OBJECTS_PER_LIST_REQUEST) for listed in (*sets, self._inputs.unlabeled))
        return StageCost(
            "plan",
            hours,
            cpu_hours=hours * self._stated.cpus_per_device,
            reads=sum(labeled_set.reads for labeled_set in sets),
            writes=lists + sum(labeled_set.shards for labeled_set in sets),
            read_bytes=sum(labeled_set.size_bytes for labeled_set in sets),
            bound_by=bound_by,
        )

    def score(self) -> StageCost:
        """Estimate one pass over the pool on all pods."""
        pool = self._inputs.unlabeled
        device = {"the device": self._rates["teacher_forward_images_per_s"]}
        speed, bound_by = self._find_bottleneck(device, pool.image_bytes)
        device_hours = pool.images / speed / HOUR_S
        return StageCost(
            "score",
            device_hours / min(self._settings.pods, max(pool.shards, 1)),
            device_hours,
            reads=pool.reads + pool.shards,
            # A lease, the scores of the shard, and its share of the files of its group.
            writes=3 * pool.shards,
            read_bytes=pool.size_bytes,
            kept_bytes=self._rows * SCORE_ROW_BYTES + pool.images * SAMPLE_ROW_BYTES,
            bound_by=bound_by,
        )

    def merge(self) -> StageCost:
        """Estimate the reading of the bands that can be selected."""
        hours = self._rows * MERGE_S_PER_ROW / HOUR_S
        read_bytes = 3 * self.selected.images * (SCORE_ROW_BYTES + SAMPLE_ROW_BYTES)
        reads = ceil(read_bytes / READ_CHUNK_BYTES) + 3 * min(self._inputs.unlabeled.shards, 1000)
        kept = self.selected.images * SELECTION_ROW_BYTES
        return StageCost("merge", hours, 0.0, hours, reads, 3, read_bytes, kept, "the CPU")

    def pack(self) -> StageCost:
        """Estimate the copy of the selected images, one ranged request each."""
        size = self.selected.size_bytes
        hours = size / self._rates["read_bytes_per_s"] / HOUR_S
        cpu_hours = hours * self._stated.cpus_per_device
        return StageCost(
            "pack", hours, 0.0, cpu_hours, self.selected.images, self.selected.shards + 2, size, size, "reading"
        )

    def training(self, recipe: str, images: int, times: int = 1) -> StageCost:
        """Estimate trainings of one recipe.

        A set that fits in memory is read once by every device. A larger set is read once in every epoch.

        Args:
            recipe: Recipe of the trainings.
            images: Images that each training processes.
            times: Trainings, one for each learning rate. They run in parallel.
        """
        source = self.selected if recipe == "pretrain" else self._inputs.labeled
        model = "teacher" if recipe == "teacher" else "student"
        devices = self._stated.training_devices
        passes = devices if source.size_bytes <= SHUFFLE_BUFFER_BYTES else images / max(source.images, 1)
        device = {"the device": self._rates[f"{model}_train_images_per_s"]}
        speed, bound_by = self._find_bottleneck(device, source.image_bytes * passes * source.images / max(images, 1))
        device_hours = images / speed / HOUR_S
        hours = device_hours / devices
        return StageCost(
            recipe,
            hours,
            device_hours * times,
            reads=ceil(source.reads * passes) * times,
            # A checkpoint of two objects every 90 seconds.
            writes=ceil(hours * 80 + 3) * times,
            read_bytes=source.size_bytes * passes * times,
            bound_by=bound_by,
        )

    def evaluate(self) -> StageCost:
        """Estimate the evaluation of four models on the test set.

        The test set is read once, or twice if the models use clips of two lengths.
        """
        test = self._inputs.test
        models = {"teacher": 1, "student": 3}
        times_read = len({self._settings.clip_frames(model) for model in models})
        hours = 0.0
        for model, times in models.items():
            device = {"the device": self._rates[f"{model}_forward_images_per_s"]}
            speed, bound_by = self._find_bottleneck(device, test.image_bytes)
            hours += times * test.images / speed / HOUR_S
        reads, read_bytes = times_read * test.reads, times_read * test.size_bytes
        return StageCost("evaluate", hours, hours, 0.0, reads, 3, read_bytes, 0.0, bound_by)

    def _find_bottleneck(self, device_limits: dict[str, float], image_bytes: float) -> tuple[float, str]:
        """Return the images per second of one device with its CPUs, and the slowest part.

        Args:
            device_limits: Images per second of the device. Empty: the stage uses none.
            image_bytes: Bytes that are read for one image.
        """
        limits = {
            **device_limits,
            "decoding": self._rates["decode_images_per_s"] * self._stated.cpus_per_device,
            "reading": self._rates["read_bytes_per_s"] / max(image_bytes, 1e-9),
        }
        bound_by = min(limits, key=lambda part: limits[part])
        return limits[bound_by], bound_by
