"""The inputs of a training."""

from typing import ClassVar

from components.shared import checkpoints
from components.shared.runfile import Augmentation
from components.shared.stage import ReceiptUri, StageConfig, digest
from components.train.recipes import RecipeName


class TrainConfig(StageConfig):
    """One training. `packed` is given for pretrain, `start` for finetune; learning rates are for 256 images."""

    stage: ClassVar[str] = "train"
    on_device: ClassVar[bool] = True

    recipe: RecipeName
    """teacher, baseline, pretrain or finetune (section 4.1)."""
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
    images_processed: int = 0
    """Images to process, forward and backward (the paper's #iter)."""
    epochs: int = 0
    """Passes over the planned training split, in addition."""
    learning_rate: float
    """For a minibatch of 256 images; scaled linearly to batch_size."""
    batch_size: int
    """Global minibatch."""
    weight_decay: float
    """Of all parameters."""
    resolution: int
    """Height and width that the model sees, in pixels."""
    augmentation: Augmentation
    """How training images are cut."""
    image_column: str = "image"
    """Parquet column of the images."""
    label_column: str = "label"
    """Parquet column, or key of a .json member, of the labels."""
    seed: int = 0
    """Of initial weights, data order and augmentation."""

    def task(self) -> str:
        """Recipe and learning rate: a run trains several models."""
        return f"train-{self.recipe}-{self.learning_rate:g}"

    def digest(self) -> str:
        """Weights from elsewhere count by their version: other bytes at the same URI are other work."""
        files = {name: uri for name in ("start_weights", "checkpoint") if (uri := getattr(self, name))}
        versions = [checkpoints.version(uri, name) for name, uri in files.items()]
        lists = [checkpoints.class_names(uri, "checkpoint_classes") for uri in [self.checkpoint_classes] if uri]
        return digest(super().digest(), versions, lists) if versions else super().digest()
