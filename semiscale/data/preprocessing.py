"""The preprocessing of a model's input, as it is stored with the model."""

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from semiscale.storage.documents import StrictDocument


class Preprocessing(StrictDocument):
    """The input of a model: a square of `resolution` pixels, cropped by `augmentation`, normalized per channel.

    `frames` is the length of a clip, and 0 for images. It is not written if it is 0, so documents and digests from
    before there were videos stay the same.
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
