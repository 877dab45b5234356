"""The inputs of a training."""

from typing import ClassVar

from components.shared.runfile import Augmentation
from components.shared.stage import ReceiptUri, StageConfig
from components.train.recipes import RecipeName


class TrainConfig(StageConfig):
    """One training. `packed` is given for pretrain, `start` for finetune; learning rates are for 256 images."""

    stage: ClassVar[str] = "train"

    recipe: RecipeName
    architecture: str
    plan: ReceiptUri
    packed: ReceiptUri = ""
    start: ReceiptUri = ""
    images_processed: int = 0
    epochs: int = 0
    learning_rate: float
    batch_size: int
    weight_decay: float
    resolution: int
    augmentation: Augmentation
    image_column: str = "image"
    label_column: str = "label"
    seed: int = 0
