"""Receipts: the small JSON documents that stages hand to each other.

A receipt names what a stage left in the workdir, counts it, and says what was skipped and why. It is written last: what
has a receipt is whole. `digest` identifies the work by its inputs, so equal work is found instead of repeated.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from components.shared import storage
from components.shared.errors import Refused, SemiscaleError


class Document(BaseModel):
    """A strict, immutable JSON document."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# In the names of files and objects: one that comes with a foreign checkpoint or receipt must not lead elsewhere.
Digest = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,99}$")]


class Receipt(Document):
    """What every stage leaves: which work this was, where it lies, how long it took."""

    stage: str
    digest: Digest
    folder: str
    seconds: float


class Failure(Document):
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str


class Split(Document):
    """One labeled set after planning. `index` is a Parquet file with one row a sample: shard, index, key, label."""

    digest: str
    index: str
    shards: str
    samples: int
    class_counts: list[int]


class PlanReceipt(Receipt):
    """The inputs, listed and checked. `units` is a JSON list of the ledger's units (see shards.Unit).

    `digest` identifies what models are trained on: the classes, the training and the validation split. The unlabeled
    pool has a digest of its own, so that a pool that grows does not retrain the teacher.
    """

    name: str
    pool_digest: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split
    units: str
    shards: int
    size_bytes: int
    pods: int
    classes_per_image: int
    failed: dict[str, int]
    failures: list[Failure]
    notes: list[str]
    run: dict[str, object]

    @property
    def videos(self) -> bool:
        """Say whether the samples are videos."""
        return bool(self.run.get("frames"))


class CountReceipt(Receipt):
    """How many pods a fan-out has, by what is left to do, and what that is. `folder` is where the pods will work."""

    pods: int
    why: str


class Preprocessing(Document):
    """What a model sees: a square of `resolution` pixels, cut as `augmentation` says, normalised per channel.

    Of a video, clips of so many `frames`, cut as clips.py says; 0 for images, and then it is not written down, so that
    documents and digests from before there were videos are still what they were.
    """

    resolution: int
    augmentation: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: int = 0

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        return fields if self.frames else {name: value for name, value in fields.items() if name != "frames"}


class Point(Document):
    """One point of a learning curve; `images_processed` counts forward and backward passes (the paper's #iter)."""

    images_processed: int
    learning_rate: float
    loss: float
    validation_top1: float | None = None


class Fitted(Document):
    """One L2 of a logistic regression, for features of length 1, and what it was chosen or left by: validation.

    `gradient` is what was left of it after so many steps, against that of no weights (components/train/logistic.py).
    """

    l2: float
    validation_top1: float
    validation_loss: float
    steps: int
    gradient: float


class TrainReceipt(Receipt):
    """A trained model. `learning_rate` is the peak, for 256 images, as in the paper's notation.

    `source` names the weights it started from, "" where those were fresh; of a ready-made teacher, which has processed
    no images, the checkpoint that it is. Where only the head was fitted (fc-only) no images are processed either, and
    there is no learning rate: `fitted` lists every `l2` that was tried, and `l2` is the one that was chosen.
    """

    recipe: str
    architecture: str
    checkpoint: str
    source: str = ""
    parameters: int
    classes: list[str]
    preprocessing: Preprocessing
    images_processed: int
    samples: int
    learning_rate: float
    validation_top1: float
    curve: list[Point]
    images_per_s: float
    l2: float = 0.0
    fitted: list[Fitted] = []

    @property
    def network(self) -> str:
        """The architecture, and how long the clips are that it sees, where it sees clips."""
        frames = self.preprocessing.frames
        return f"{self.architecture}, {frames} frames" if frames else self.architecture


class Clocks(Document):
    """Where the scan's time went, in thread-seconds. Many threads decode: what to buy more of is a receipt's `slowest`.

    `write` is encoding, and the share of putting the unit's files together. The upload of a shard's own part is not in
    it: the part holds these clocks, and is whole before it is sent. The log's lines count it.
    """

    read: float = 0.0
    decode: float = 0.0
    forward: float = 0.0
    write: float = 0.0


class Images(Document):
    """How many images each part of the scan worked on: what has no bytes is not decoded, what is damaged not forwarded,
    what has scores that are not finite not written."""

    read: int = 0
    decode: int = 0
    forward: int = 0
    write: int = 0


class ShardCount(Document):
    """One shard's line in the ledger: listed = scored + failed.

    `listed` is counted where the shard is read, and the others where scores are written, so that a sample that was lost
    in between is a hole.
    """

    shard: str
    digest: str
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: Clocks = Clocks()
    images: Images = Images()

    def refuse_hole(self) -> None:
        """Raise SemiscaleError where the line does not add up."""
        if self.listed != self.scored + sum(self.failed.values()):
            raise SemiscaleError(
                f"shard {self.shard}: {self.listed} listed, but {self.scored} scored, failed: {self.failed or 'none'}; "
                "a sample was lost: score it again"
            )


class UnitReceipt(Receipt):
    """The scores of one unit: Parquet files (see components/shared/scores.py and places.py).

    A unit that turned out to have more images than can be ranked at once has `pieces` instead of files: each has some
    of its shards and files of its own, as if it were a unit. What is counted here is their sum.

    `slowest` is the part of the scan that the others waited for, "" where nothing was scanned.
    """

    teacher: str
    pod: int
    scores: str
    places: str
    samples: str
    shards: list[ShardCount]
    failures: list[Failure]
    clocks: Clocks
    images: Images = Images()
    slowest: str = ""
    pieces: list["UnitReceipt"] = []

    @property
    def scored(self) -> int:
        """How many images have scores."""
        return sum(shard.scored for shard in self.shards)


class ScoreReceipt(Receipt):
    """What one pod did: units it scored, units it found finished, its clocks, and the slowest part of its scan."""

    pod: int
    teacher: str
    units: int
    units_found: int
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: Clocks
    images: Images = Images()
    slowest: str = ""


class ClassSelection(Document):
    """One class of D̂: how many images were wanted and found, and the log-odds of the last one.

    `unique` of them were selected for no other class.
    """

    name: str
    wanted: int
    found: int
    unique: int
    full: bool
    last_score: float | None


class Ledger(Document):
    """The scan's balance: listed = scored + failed + removed."""

    listed: int
    scored: int
    failed: int
    removed: int


class Removal(Document):
    """A removal list: how many keys it has, how many of them match no scored image, and a few of those."""

    keys: int
    unmatched: int
    examples: list[str]

    def told(self) -> str:
        """Say what matches nothing, in one line; nothing where all keys match."""
        if not self.unmatched:
            return ""
        examples = ", ".join(map(repr, self.examples))
        return (
            f"removal list: {self.unmatched:,} of {self.keys:,} keys match no scored image, for example {examples}; "
            "the key of an image in a tar is its name up to the first dot"
        )


class Renewal(Document):
    """The share of D̂ that changed since it was last trained on. `kept`: too little, and this is the earlier D̂."""

    changed: float
    retrain_above: float
    kept: bool


class SelectionReceipt(Receipt):
    """D̂: a Parquet file with one row an (image, class): class, rank, score, shard, index, key, offset, size.

    `changed_by_last_tenth` is the share of D̂ that would be other images had the scan stopped before the last tenth of
    the shards, by name: about 0.1 where the pool is the same throughout, more where its end is unlike the rest.
    `ledger` adds up `shards`, a Parquet file with one line a shard: shard, listed, scored, failed, removed.
    `removal` says what the removal list came to, where there is one.
    `renewal` says how it came to be trained on, where the run had another D̂ before.
    """

    selection: str
    teacher: str
    images: int
    unique_images: int
    changed_by_last_tenth: float
    images_per_class: int
    classes_per_image: int
    per_class: list[ClassSelection]
    ledger: Ledger
    shards: str = ""
    failed: dict[str, int]
    bytes_read: int
    removal: Removal | None = None
    renewal: Renewal | None = None


class PackReceipt(Receipt):
    """D̂ copied into shuffled WebDataset tars, listed in `shards` (JSON)."""

    shards: str
    tars: int
    samples: int
    class_counts: list[int]
    size_bytes: int


Interval = tuple[float, float]


class Accuracy(Document):
    """A model on the test set. Fractions in [0, 1]; intervals cover 95% (see measures.py).

    `receipt` is the training's digest, `training` the URI of its receipt, `predictions` that of a Parquet file with one
    row an image.
    """

    top1: float
    top5: float
    calibration_error: float
    top1_interval: Interval
    top5_interval: Interval
    calibration_error_interval: Interval
    images: int
    architecture: str
    receipt: str
    training: str
    predictions: str
    learning_rate: float


class Comparison(Document):
    """Two models on the same images: `wins` counts those that only `model` gets right, `losses` only `against`.

    `p_value` is McNemar's, exact, two-sided; `p_worse` is the chance of so few wins were the two equally good.
    """

    model: str
    against: str
    wins: int
    losses: int
    difference: float
    interval: Interval
    p_value: float
    p_worse: float


class Confusion(Document):
    """How many images of a class (row) were given which class (column)."""

    classes: list[str]
    counts: list[list[int]]


class Tried(Document):
    """One learning rate of a sweep, and what it was chosen or left by: the validation top-1."""

    learning_rate: float
    validation_top1: float
    receipt: str


class EvaluationReceipt(Receipt):
    """The four models on the same test images: accuracies, top-1 by class, the student against the others.

    `tried` lists every learning rate of baseline and student, `chosen` those that were measured; `confusion` is the
    student's.
    """

    models: dict[str, Accuracy]
    per_class: dict[str, list[float]]
    per_class_intervals: dict[str, list[Interval]]
    chosen: dict[str, float]
    tried: dict[str, list[Tried]]
    comparisons: list[Comparison]
    confusion: Confusion


class Measurement(Document):
    """One model on a test set, as the evaluation measures four: accuracies, top-1 by class, what was taken for what."""

    model: Accuracy
    classes: list[str]
    per_class: list[float]
    per_class_intervals: list[Interval]
    confusion: Confusion


class PromotionReceipt(Receipt):
    """Whether the student became the champion, and why. `champion` is the URI of the object that names the champion.

    `comparison` is None where there was nothing to compare: the student is the champion, or the classes differ.
    """

    champion: str
    model: str
    promoted: bool
    why: str
    comparison: Comparison | None


class ReportReceipt(Receipt):
    """Where the page and the numbers lie."""

    report: str
    results: str


R = TypeVar("R", bound=Document)


def load(uri: str, kind: type[R]) -> R:
    """Read a document. Raises Refused where there is none or it is of another kind."""
    data = storage.read_if_there(uri)
    if data is None:
        raise Refused(f"{uri}: no {kind.__name__} here; run the stage that writes it first")
    try:
        return kind.model_validate_json(data)
    except ValueError:
        raise Refused(f"{uri}: not a {kind.__name__}; was it written by another version?") from None
