"""Describe the input that a model expects.

The description is stored with the model's weights and is part of digests.
"""

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from semiscale.storage.documents import StrictDocument


class Preprocessing(StrictDocument):
    """The input of a model: size, cropping and normalization.

    Attributes:
        resolution: The side of the square input, in pixels.
        augmentation: The random cropping of training images, such as `crop-flip`. It also selects the evaluation crop.
        mean: The mean of each RGB channel, in 0 to 1.
        std: The standard deviation of each RGB channel.
        frames: The length of a clip, or 0 for images.
    """

    resolution: int
    augmentation: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: int = 0

    @model_serializer(mode="wrap")
    def _omit_zero_frames(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `frames` if it is 0.

        Documents and digests of versions that knew no videos stay the same.
        """
        fields: dict[str, Any] = write(self)
        return fields if self.frames else {name: value for name, value in fields.items() if name != "frames"}
