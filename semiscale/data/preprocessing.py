"""Receipts: the small JSON documents that stages hand to each other.

A receipt names what a stage left in the workdir, counts it, and says what was skipped and why. It is written last: what
has a receipt is whole. `digest` identifies the work by its inputs, so equal work is found instead of repeated.
"""

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from semiscale.storage.documents import StrictDocument


class Preprocessing(StrictDocument):
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
