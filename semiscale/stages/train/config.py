"""The configs of a training and of a linear probe."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from semiscale.common.digest import content_digest
from semiscale.config.run_parameters import (
    OMIT_DEFAULT_FROM_DIGEST,
    RECIPE_DEFAULT,
    Augmentation,
    Positive,
    RunParameters,
)
from semiscale.data.preprocessing import Preprocessing
from semiscale.models import checkpoint_metadata
from semiscale.runtime.stage_config import NOT_IN_DIGEST, ReceiptUri, StageConfig
from semiscale.stages.train.recipes import RECIPES, Recipe, RecipeName, get_recipe

# Fields that take the number of the recipe unless they are given.
RECIPE_FIELDS = ("learning_rate", "batch_size", "device_batch_size", "weight_decay")


class TrainConfig(StageConfig):
    """The inputs of one training.

    A recipe that learns from D̂ needs `packed`. A recipe that starts from another model needs `start` or
    `start_weights`. A number that is not given, or is -1, is the recipe's. The length is the recipe's if neither
    `images_processed` nor `epochs` is given.
    """

    stage: ClassVar[str] = "train"
    on_device: ClassVar[bool] = True

    recipe: RecipeName
    """teacher, baseline, pretrain or finetune (section 4.1). semiscale/stages/train/recipes.py lists the others."""
    architecture: str
    """Name of the network."""
    plan: ReceiptUri
    """Receipt of the plan stage. It has the classes, the training split and the validation split."""
    packed: ReceiptUri = ""
    """Receipt of the pack stage, for pretrain."""
    start: ReceiptUri = ""
    """Receipt of the model to start from, for finetune."""
    start_weights: str = ""
    """URI of weights to start from: .safetensors, .pth or .pt. A head of another size is replaced."""
    checkpoint: str = ""
    """URI of a ready-made teacher. It is checked and used as it is, and nothing is trained."""
    checkpoint_classes: str = ""
    """URI of a text file with one class name a line: the classes of the ready-made teacher's outputs, in order."""
    images_processed: Annotated[int, Field(ge=0)] = 0
    """Images to process forward and backward (#iter in the paper)."""
    epochs: Annotated[int, Field(ge=0)] = 0
    """Passes over the planned training split, in addition to images_processed."""
    learning_rate: Annotated[float, Field(gt=0)] = RECIPE_DEFAULT
    """Learning rate for a minibatch of 256 images. It is scaled linearly to batch_size."""
    batch_size: Positive = RECIPE_DEFAULT
    """Images of the global minibatch, which all devices share."""
    device_batch_size: Positive = RECIPE_DEFAULT
    """Images that a device forwards at a time and normalizes together. Gradients add up to batch_size."""
    weight_decay: Annotated[float, Field(ge=0)] = RECIPE_DEFAULT
    """Weight decay of all parameters. The modern recipe leaves out normalization layers."""
    resolution: int
    """Height and width of the model's input, in pixels."""
    augmentation: Augmentation
    """How training images are cropped."""
    frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = 0
    """Frames of the clips that the model sees, or 0 for images."""
    own_frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = 0
    """Replaces frames unless it is 0. A teacher may see longer clips than the students of its run."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, data order and augmentation."""
    checkpoint_minutes: Annotated[float, NOT_IN_DIGEST, Field(ge=0)] = 1.5
    """Minutes between checkpoints, or more if these would cost above 1 % of the time. At 0 each step waits for one."""

    @classmethod
    def from_run(cls, run: RunParameters, given: Mapping[str, Any]) -> Self:
        """Return the config of one of a run's trainings (section 4.1).

        Args:
            run: The run's parameters.
            given: `role`, which is teacher, baseline, pretrain or finetune. Further the receipts, and in a sweep
                `learning_rate`.

        Returns:
            The config.
        """
        student = {"architecture": run.student_architecture, "start_weights": run.student_start_weights}
        by_role: dict[str, dict[str, Any]] = {
            "teacher": {
                "recipe": "teacher",
                "architecture": run.teacher_architecture,
                "images_processed": run.teacher_images_processed,
                "learning_rate": run.teacher_learning_rate,
                "own_frames": run.teacher_frames,
                "start_weights": run.teacher_start_weights,
                "checkpoint": run.teacher_checkpoint,
                "checkpoint_classes": run.teacher_classes,
            },
            # Section 4.3: the baseline is the student's network on D alone, for as many images as the student.
            "baseline": {
                "recipe": run.baseline_recipe,
                "images_processed": run.pretrain_images_processed,
                "epochs": run.finetune_epochs,
                **student,
            },
            "pretrain": {
                "recipe": "pretrain",
                "images_processed": run.pretrain_images_processed,
                "learning_rate": run.pretrain_learning_rate,
                **student,
            },
            "finetune": {
                "recipe": "finetune",
                "architecture": run.student_architecture,
                "epochs": run.finetune_epochs,
            },
        }
        task = {name: value for name, value in given.items() if name != "role" and value != RECIPE_DEFAULT}
        return super().from_run(run, {**by_role[given["role"]], **task})

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, given: Any) -> Any:
        """Fill in the recipe's numbers, so that the digest covers all numbers of the training."""
        if not isinstance(given, dict) or given.get("recipe") not in RECIPES:
            # The validation of the field `recipe` rejects this.
            return given
        if own := int(given.get("own_frames", 0)):
            given = {**given, "frames": own, "own_frames": 0}
        recipe = get_recipe(given["recipe"], int(given.get("frames", 0)))
        missing = [name for name in RECIPE_FIELDS if float(given.get(name, RECIPE_DEFAULT)) == RECIPE_DEFAULT]
        filled = {name: getattr(recipe, name) for name in missing}
        if not int(given.get("images_processed", 0)) and not int(given.get("epochs", 0)):
            filled |= {"images_processed": recipe.images_processed, "epochs": recipe.epochs}
        return {**given, **filled}

    @property
    def resolved_recipe(self) -> Recipe:
        """Return the recipe for images, or for clips if there are frames."""
        return get_recipe(self.recipe, self.frames)

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing of the model's input."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation, frames=self.frames)

    def task_name(self) -> str:
        """Return a name with the recipe and the learning rate, because a run trains several models."""
        return f"train-{self.recipe}-{self.learning_rate:g}"

    def digest(self) -> str:
        """Return a digest that also depends on the version of weights from outside the run.

        Other bytes at the same URI make another training.
        """
        files = {name: uri for name in ("start_weights", "checkpoint") if (uri := getattr(self, name))}
        versions = [checkpoint_metadata.checkpoint_version(uri, name) for name, uri in files.items()]
        lists = [
            checkpoint_metadata.read_class_names(uri, "checkpoint_classes") for uri in [self.checkpoint_classes] if uri
        ]
        return content_digest(super().digest(), versions, lists) if versions else super().digest()


class LinearProbeConfig(StageConfig):
    """The inputs of a linear probe: a new head is fitted to a network that stays as it is.

    The paper calls this transfer setting *fc-only* (section 5.2).
    """

    stage: ClassVar[str] = "train"
    on_device: ClassVar[bool] = True

    architecture: str
    """Name of the network, which must be one for images."""
    plan: ReceiptUri
    """Receipt of the plan stage. It has the classes, the training split and the validation split."""
    start_weights: str
    """URI of the network's weights: .safetensors, .pth or .pt."""
    resolution: int
    """Height and width of the model's input, in pixels."""
    augmentation: Augmentation
    """Augmentation that the network was trained with. With the resolution it decides how an image is cropped."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing of the model's input."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation)

    def digest(self) -> str:
        """Return a digest that also depends on the version of the weights.

        Other bytes at the same URI make another probe.
        """
        return content_digest(
            super().digest(), checkpoint_metadata.checkpoint_version(self.start_weights, "start_weights")
        )
