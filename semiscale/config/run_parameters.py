"""The run-file keys: the one place where a key, its type, bounds, default and description are written.

The form of the pipeline, the JSON Schema, the reference in the documentation and the inputs of the stages are derived
from `RunParameters`. The defaults are the paper's; a description names the section, or says that the paper is silent.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from semiscale.common.text import has_credentials

Augmentation = Literal["crop-flip", "shift-flip", "shift"]
Promotion = Literal["if-not-worse", "never"]
Decoder = Literal["cpu", "gpu"]
BaselineRecipe = Literal["baseline", "modern"]


# The type of the errors of the checks in this module. Their texts say what to give.
OWN_CHECK: Final = "own_check"
# Patterns that texts must match. A refusal states them in words.
NOT_EMPTY_PATTERN = r"\S"
RUN_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
OPTIONAL_NAME_PATTERN = r"^([a-z0-9][a-z0-9._-]{0,62})?$"
_RUN_NAME = "1 to 63 lower-case letters, digits, dots, underscores or hyphens, a letter or digit first"
PATTERN_DESCRIPTIONS = {
    NOT_EMPTY_PATTERN: "a URI that is not empty",
    RUN_NAME_PATTERN: _RUN_NAME,
    OPTIONAL_NAME_PATTERN: f"{_RUN_NAME}, or an empty text",
}


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value] if value else []
    return value


def _check_no_credentials(uri: str) -> str:
    if has_credentials(uri):
        raise PydanticCustomError(OWN_CHECK, "a URI without credentials, because logs and receipts hold it")
    return uri


CredentialFreeUri = Annotated[str, AfterValidator(_check_no_credentials)]
Uri = Annotated[CredentialFreeUri, Field(pattern=NOT_EMPTY_PATTERN)]
Uris = Annotated[list[Uri], BeforeValidator(_as_list)]
LearningRates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


# The value of a key that is left to the recipe of each training.
RECIPE_DEFAULT = -1


def _check_positive_or_default(value: int) -> int:
    if value < 1 and value != RECIPE_DEFAULT:
        raise PydanticCustomError(OWN_CHECK, "1 or more, or -1 for the recipe's value")
    return value


def _check_non_negative_or_default(value: float) -> float:
    if value < 0 and value != RECIPE_DEFAULT:
        raise PydanticCustomError(OWN_CHECK, "0 or more, or -1 for the recipe's value")
    return value


PositiveOrRecipeDefault = Annotated[int, AfterValidator(_check_positive_or_default)]
NonNegativeOrRecipeDefault = Annotated[float, AfterValidator(_check_non_negative_or_default)]
# Keys of the URIs that a run reads. It writes under `workdir` alone.
INPUT_URI_KEYS = (
    *("labeled", "unlabeled", "validation", "test", "classes", "remove"),
    *("teacher_checkpoint", "teacher_classes", "teacher_start_weights", "student_start_weights"),
)
# Marks a key that was added after digests had been stored. At its default it is not part of a digest.
OMIT_DEFAULT_FROM_DIGEST = "later"


class RunParameters(BaseModel):
    """The parameters of a run.

    `labeled`, `unlabeled`, `validation` and `test` take a URI or a list of URIs, of any mix of kinds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=RUN_NAME_PATTERN, description="The run's name: a folder in the workdir.")
    workdir: CredentialFreeUri = Field(min_length=1, description="URI of the folder for all results.")
    labeled: Uris = Field(min_length=1, description="D: URIs of class folders, WebDataset tars or Parquet files.")
    unlabeled: Uris = Field(description="U: the same kinds, or a prefix of loose image files; no labels.")
    test: Uris = Field(
        min_length=1, description="The test set. It is measured at the end, and decides only the promotion."
    )
    validation: Uris = Field(
        default=[], description="The set that chooses learning rates. Empty: held out from the labeled set."
    )
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of each class that is held out if no validation set is given."
    )
    classes: CredentialFreeUri = Field(
        default="", description="URI of a text file with the names of classes 0, 1, …, one a line."
    )
    image_column: str = Field(default="image", description="Parquet column of image bytes or of image URIs.")
    label_column: str = Field(default="label", description="Parquet column, or key of a .json member, of the label.")
    images_per_class: Positive = Field(default=16_000, description="K: images selected per class (section 4.1).")
    classes_per_image: Positive = Field(
        default=10, description="P: number of classes that an image may be ranked in (section 4.1)."
    )
    remove: CredentialFreeUri = Field(
        default="", description="URI of a text file with keys of images that are never selected, one a line."
    )
    packed_tar_bytes: Positive = Field(
        default=256 << 20, description="Approximate size of a tar of D̂. A training reads up to 64 tars at a time."
    )
    teacher_architecture: str = Field(
        default="resnext101_32x48d",
        description="The teacher's network (section 4.1); the documentation lists the names.",
    )
    student_architecture: str = Field(
        default="resnet50",
        description="The network of student and baseline (section 4.1); the documentation lists the names.",
    )
    teacher_checkpoint: CredentialFreeUri = Field(
        default="",
        description="URI of a trained teacher, which is checked and not trained. A suffix #sha256=… pins its bytes.",
    )
    teacher_classes: CredentialFreeUri = Field(
        default="",
        description="URI of a text file with the classes of a trained teacher's outputs 0, 1, …, one a line.",
    )
    teacher_start_weights: CredentialFreeUri = Field(
        default="", description="URI of weights that the teacher starts from. A head of another size is replaced."
    )
    student_start_weights: CredentialFreeUri = Field(
        default="",
        description="URI of weights that student and baseline start from. A head of another size is replaced.",
    )
    teacher_images_processed: Positive = Field(
        default=115_000_000,
        description="Length of the teacher's training. The default is 90 epochs of ImageNet; the paper states none.",
    )
    pretrain_images_processed: Positive = Field(
        default=1_000_000_000,
        description="The paper's #iter: number of images that the student processes in pre-training (section 4.1).",
    )
    finetune_epochs: Positive = Field(
        default=30, description="Length of the fine-tuning, in passes over the labeled set (section 4.1)."
    )
    batch_size: PositiveOrRecipeDefault = Field(
        default=RECIPE_DEFAULT, description="Global minibatch, in images. -1: the recipe's, 64 x 24 (section 4.1)."
    )
    device_batch_size: PositiveOrRecipeDefault = Field(
        default=RECIPE_DEFAULT,
        description="Images that a device forwards and normalises together. -1: the recipe's, 24 (section 4.1).",
    )
    teacher_learning_rate: float = Field(
        default=0.1, gt=0, description="Learning rate for 256 images, scaled linearly to the minibatch."
    )
    pretrain_learning_rate: float = Field(
        default=0.1, gt=0, description="Learning rate for 256 images, scaled linearly to the minibatch (section 4.1)."
    )
    baseline_learning_rates: LearningRates = Field(
        default=[0.05, 0.1, 0.2],
        description="Learning rates for 256 images. Validation chooses one, as for the student.",
    )
    finetune_learning_rates: LearningRates = Field(
        default=[0.00025, 0.00075, 0.0025],
        description="Learning rates for 256 images. Validation chooses one. The first is the paper's (section 4.1).",
    )
    baseline_recipe: BaselineRecipe = Field(
        default="baseline",
        description="baseline: the teacher's recipe. modern: torchvision's newest, with mixup and TrivialAugment.",
    )
    weight_decay: NonNegativeOrRecipeDefault = Field(
        # kfp distinguishes 1 from 1.0.
        default=float(RECIPE_DEFAULT),
        description="Weight decay. -1: the recipe's, 0.0001 (section 4.1).",
    )
    resolution: int = Field(default=224, ge=8, le=2048, description="Height and width of the models' input, in pixels.")
    augmentation: Augmentation = Field(
        default="crop-flip",
        description="crop-flip: random resized crop and mirroring. shift-flip, shift: random shift, for tiny images.",
    )
    frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = Field(
        default=0,
        ge=0,
        le=128,
        description="Frames of a clip if the samples are videos (section 5.1: 8 or 32). 0: the samples are images.",
    )
    teacher_frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = Field(
        default=0, ge=0, le=128, description="Frames of the teacher's clips (Table 7: 32). 0: the same as frames."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of initial weights, data order and augmentation.")
    pods: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="Largest number of containers that share the scan, and the packing.",
    )
    decoder: Decoder = Field(
        default="cpu",
        description="Decoder of the unlabeled JPEGs. cpu: as in training. gpu: nvJPEG, whose pixels differ slightly.",
    )
    max_failed_fraction: float = Field(
        default=0.01, ge=0, le=1, description="Largest share of unreadable samples in a set. The run fails above it."
    )
    budget_hours: float = Field(
        default=0.0,
        ge=0,
        description="Device-hours after which the run stops cleanly; a pod without GPUs counts as one. 0: no limit.",
    )
    retrain_above: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the selection that a grown pool must change before students are trained again.",
    )
    promotion: Promotion = Field(
        default="if-not-worse",
        description="Whether the student becomes the champion: if-not-worse on the same test images, or never.",
    )
    champion: str = Field(
        default="",
        pattern=OPTIONAL_NAME_PATTERN,
        description="Name of the champion that the student is compared with. Empty: the run's name.",
    )

    def clip_frames(self, model: str) -> int:
        """Return the number of frames in a model's clips, 0 for images.

        Args:
            model: `teacher` or `student`.
        """
        return self.teacher_frames or self.frames if model == "teacher" else self.frames
