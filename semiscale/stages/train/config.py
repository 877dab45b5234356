"""The inputs of a training."""

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

RECIPE_FIELDS = ("learning_rate", "batch_size", "device_batch_size", "weight_decay")


class TrainConfig(StageConfig):
    """One training. `packed` is given for a recipe that learns from D̂, `start` for one that goes on from a model.

    A number that is not given, or is -1, is the recipe's; so is the length, where neither images nor epochs are given.
    """

    stage: ClassVar[str] = "train"
    on_device: ClassVar[bool] = True

    recipe: RecipeName
    """teacher, baseline, pretrain or finetune (section 4.1); others are listed in semiscale/stages/train/recipes.py."""
    architecture: str
    """The network, by name."""
    plan: ReceiptUri
    """The plan's receipt: classes, training and validation split."""
    packed: ReceiptUri = ""
    """The packed selection's receipt, for pretrain."""
    start: ReceiptUri = ""
    """The receipt of the model to start from, for finetune."""
    start_weights: str = ""
    """URI of weights to start from, .safetensors, .pth or .pt; a head of another size is replaced."""
    checkpoint: str = ""
    """URI of a ready-made teacher, which is checked and used as it is: nothing is trained."""
    checkpoint_classes: str = ""
    """URI of a text file, one class name a line: what the ready-made teacher's outputs 0, 1, … mean."""
    images_processed: Annotated[int, Field(ge=0)] = 0
    """Images to process, forward and backward (the paper's #iter)."""
    epochs: Annotated[int, Field(ge=0)] = 0
    """Passes over the planned training split, in addition."""
    learning_rate: Annotated[float, Field(gt=0)] = RECIPE_DEFAULT
    """For a minibatch of 256 images; scaled linearly to batch_size."""
    batch_size: Positive = RECIPE_DEFAULT
    """Global minibatch: of all devices together."""
    device_batch_size: Positive = RECIPE_DEFAULT
    """Images that a device forwards at a time and normalises together; gradients add up to batch_size."""
    weight_decay: Annotated[float, Field(ge=0)] = RECIPE_DEFAULT
    """Of all parameters; the modern recipe leaves out the normalisation layers'."""
    resolution: int
    """Height and width that the model sees, in pixels."""
    augmentation: Augmentation
    """How training images are cut."""
    frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = 0
    """Frames of a clip that the model sees; 0: it sees images."""
    own_frames: Annotated[int, OMIT_DEFAULT_FROM_DIGEST] = 0
    """Put in the place of frames, where it is not 0: a pipeline's teacher may see longer clips than its students."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initial weights, data order and augmentation."""
    checkpoint_minutes: Annotated[float, NOT_IN_DIGEST, Field(ge=0)] = 10.0
    """Time between checkpoints: what a killed training repeats at most."""

    @classmethod
    def from_run(cls, run: RunParameters, given: Mapping[str, Any]) -> Self:
        """Return the config of one of a run's trainings (section 4.1).

        Args:
            run: The run's parameters.
            given: `role`, one of teacher, baseline, pretrain and finetune; the receipts; `learning_rate` in a sweep.
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
            # Section 4.3: the same network on D alone, for as many images as the student.
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
    def _of_the_recipe(cls, given: Any) -> Any:
        """Fill in the recipe's numbers, so that the digest of a training holds what was trained with."""
        if not isinstance(given, dict) or given.get("recipe") not in RECIPES:
            return given  # refused by the field itself
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
        """The recipe's numbers, for images or for clips."""
        return get_recipe(self.recipe, self.frames)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the model sees."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation, frames=self.frames)

    def task_name(self) -> str:
        """Recipe and learning rate: a run trains several models."""
        return f"train-{self.recipe}-{self.learning_rate:g}"

    def digest(self) -> str:
        """Weights from elsewhere count by their version: other bytes at the same URI are other work."""
        files = {name: uri for name in ("start_weights", "checkpoint") if (uri := getattr(self, name))}
        versions = [checkpoint_metadata.checkpoint_version(uri, name) for name, uri in files.items()]
        lists = [
            checkpoint_metadata.read_class_names(uri, "checkpoint_classes") for uri in [self.checkpoint_classes] if uri
        ]
        return content_digest(super().digest(), versions, lists) if versions else super().digest()


class LinearProbeConfig(StageConfig):
    """One fitting of a new head to a network that stays as it is (head.py): the transfer setting fc-only."""

    stage: ClassVar[str] = "train"
    on_device: ClassVar[bool] = True

    architecture: str
    """The network, by name; one for images."""
    plan: ReceiptUri
    """The plan's receipt: classes, training and validation split."""
    start_weights: str
    """URI of the network's weights, .safetensors, .pth or .pt."""
    resolution: int
    """Height and width that the model sees, in pixels."""
    augmentation: Augmentation
    """What it was trained by: with the resolution, how an image is cut that is measured."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What the model sees."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation)

    def digest(self) -> str:
        """Weights count by their version: other bytes at the same URI are other work."""
        return content_digest(
            super().digest(), checkpoint_metadata.checkpoint_version(self.start_weights, "start_weights")
        )
