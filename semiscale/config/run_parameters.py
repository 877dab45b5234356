"""The run file: every parameter of a run, with the paper's values as defaults.

Its keys are the pipeline's parameters, one to one, and `hardware`; a test holds the two together. What the paper
states carries the section; what it leaves open says so.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from semiscale.common.text import has_credentials

Augmentation = Literal["crop-flip", "shift-flip", "shift"]


Promotion = Literal["if-not-worse", "never"]


Decoder = Literal["cpu", "gpu"]


BaselineRecipe = Literal["baseline", "modern"]


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value] if value else []
    return value


def _check_no_credentials(uri: str) -> str:
    if has_credentials(uri):
        raise PydanticCustomError("credentials", "credentials do not belong in a URI, which logs and receipts hold")
    return uri


CredentialFreeUri = Annotated[str, AfterValidator(_check_no_credentials)]


Uri = Annotated[CredentialFreeUri, Field(pattern=r"\S")]


Uris = Annotated[list[Uri], BeforeValidator(_as_list)]


LearningRates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


Positive = Annotated[int, Field(ge=1)]


RECIPE_DEFAULT = -1  # where a number is left to each training's recipe


def _check_positive_or_default(value: int) -> int:
    if value < 1 and value != RECIPE_DEFAULT:
        raise PydanticCustomError("the_recipes", "expected 1 or more, or -1: the recipe's")
    return value


def _check_non_negative_or_default(value: float) -> float:
    if value < 0 and value != RECIPE_DEFAULT:
        raise PydanticCustomError("the_recipes", "expected 0 or more, or -1: the recipe's")
    return value


PositiveOrRecipeDefault = Annotated[int, AfterValidator(_check_positive_or_default)]


NonNegativeOrRecipeDefault = Annotated[float, AfterValidator(_check_non_negative_or_default)]


INPUT_URI_KEYS = (  # keys of the URIs that a run reads; where it writes is the workdir
    *("labeled", "unlabeled", "validation", "test", "classes", "remove"),
    *("teacher_checkpoint", "teacher_classes", "teacher_start_weights", "student_start_weights"),
)


OMIT_DEFAULT_FROM_DIGEST = (
    "later"  # marks a key that came after digests were kept: at its default it is no part of them
)


class RunParameters(BaseModel):
    """A run's parameters. `labeled`, `unlabeled`, `validation` and `test` take a URI or a list, of any mix of kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="The run's name: a folder in the workdir.")
    workdir: CredentialFreeUri = Field(min_length=1, description="URI of the folder that everything bulky goes under.")
    labeled: Uris = Field(min_length=1, description="D: URIs of class folders, WebDataset tars or Parquet files.")
    unlabeled: Uris = Field(description="U: the same kinds, or a prefix of loose image files; no labels.")
    test: Uris = Field(min_length=1, description="The test set. It chooses nothing and is measured once, at the end.")
    validation: Uris = Field(default=[], description="Chooses learning rates. Empty: held out from the labeled set.")
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of each class held out where no validation set is given."
    )
    classes: CredentialFreeUri = Field(
        default="", description="URI of a text file, one class name a line: what label 0, 1, … mean."
    )
    image_column: str = Field(default="image", description="Parquet column of image bytes or of image URIs.")
    label_column: str = Field(default="label", description="Parquet column, or key of a .json member, of the label.")
    images_per_class: Positive = Field(default=16_000, description="K: images selected per class (section 4.1).")
    classes_per_image: Positive = Field(default=10, description="P: classes an image may be ranked in (section 4.1).")
    remove: CredentialFreeUri = Field(
        default="", description="URI of a text file, one key a line: images never to select (opt-outs)."
    )
    packed_tar_bytes: Positive = Field(
        default=256 << 20, description="Size of D̂'s tars, about. A training reads up to 64 at a time."
    )
    teacher_architecture: str = Field(
        default="resnext101_32x48d", description="The teacher's network, by its name in the README (section 4.1)."
    )
    student_architecture: str = Field(
        default="resnet50", description="Student's and baseline's network, by its name in the README (section 4.1)."
    )
    teacher_checkpoint: CredentialFreeUri = Field(
        default="",
        description="URI of a ready-made teacher, checked and used as it is; #sha256=… after it pins its bytes.",
    )
    teacher_classes: CredentialFreeUri = Field(
        default="", description="URI of a text file: what a ready-made teacher's outputs 0, 1, … mean."
    )
    teacher_start_weights: CredentialFreeUri = Field(
        default="", description="URI of weights the teacher starts from; a head of another size is replaced."
    )
    student_start_weights: CredentialFreeUri = Field(
        default="", description="URI of weights student and baseline start from; a head of another size is replaced."
    )
    teacher_images_processed: Positive = Field(
        default=115_000_000, description="Length of the teacher's training: 90 epochs of ImageNet; not in the paper."
    )
    pretrain_images_processed: Positive = Field(
        default=1_000_000_000, description="The paper's #iter: images the student sees in pre-training (section 4.1)."
    )
    finetune_epochs: Positive = Field(default=30, description="Length of the fine-tuning (section 4.1).")
    batch_size: PositiveOrRecipeDefault = Field(
        default=RECIPE_DEFAULT, description="Global minibatch. -1: each recipe's, 64 x 24 (section 4.1)."
    )
    device_batch_size: PositiveOrRecipeDefault = Field(
        default=RECIPE_DEFAULT,
        description="Images a device forwards and normalises together. -1: each recipe's, 24 (section 4.1).",
    )
    teacher_learning_rate: float = Field(default=0.1, gt=0, description="For 256 images; scaled to the minibatch.")
    pretrain_learning_rate: float = Field(default=0.1, gt=0, description="For 256 images (section 4.1).")
    baseline_learning_rates: LearningRates = Field(
        default=[0.05, 0.1, 0.2], description="For 256 images; chosen on validation, as the student's are."
    )
    finetune_learning_rates: LearningRates = Field(
        default=[0.00025, 0.00075, 0.0025],
        description="For 256 images; chosen on validation. The paper's is the first (section 4.1).",
    )
    baseline_recipe: BaselineRecipe = Field(
        default="baseline",
        description="baseline: as the teacher's; modern: torchvision's newest, with mixup and TrivialAugment.",
    )
    weight_decay: NonNegativeOrRecipeDefault = Field(
        # kfp tells 1 from 1.0.
        default=float(RECIPE_DEFAULT),
        description="-1: each recipe's, 0.0001 (section 4.1).",
    )
    resolution: int = Field(default=224, ge=8, le=2048, description="Height and width the models see, in pixels.")
    augmentation: Augmentation = Field(
        default="crop-flip",
        description="crop-flip: random resized crop and mirror; shift-flip, shift: random shift, for tiny images.",
    )
    frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = Field(
        default=0,
        ge=0,
        le=128,
        description="Frames of a clip, where the samples are videos (section 5.1: 8 or 32); 0: images.",
    )
    teacher_frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = Field(
        default=0, ge=0, le=128, description="Frames of the teacher's clips (Table 7: 32); 0: as frames."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of initial weights, data order and augmentation.")
    pods: int = Field(
        default=8,
        ge=1,
        le=256,
        description="At most so many containers share the scan of the unlabeled images, and the packing.",
    )
    decoder: Decoder = Field(
        default="cpu",
        description="What decodes the unlabeled JPEGs: cpu, as in training; gpu: nvJPEG, whose pixels differ slightly.",
    )
    max_failed_fraction: float = Field(
        default=0.01, ge=0, le=1, description="Share of unreadable samples in a set above which the run fails."
    )
    budget_hours: float = Field(
        default=0.0,
        ge=0,
        description="Device-hours (GPUs, or pods without) after which the run stops cleanly; 0: no limit.",
    )
    retrain_above: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the selection that a grown pool must have changed before students are trained again.",
    )
    promotion: Promotion = Field(
        default="if-not-worse",
        description="Whether the student becomes the champion: if-not-worse on the same test images, or never.",
    )
    champion: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$",
        description="Name of the champion to compete with, in the workdir. Empty: the run's name.",
    )

    def clip_frames(self, model: str) -> int:
        """Return how many frames the clips of `teacher` or `student` have, 0 where they see images."""
        return self.teacher_frames or self.frames if model == "teacher" else self.frames
