"""Receipts: the small JSON documents that stages pass to each other.

A receipt names the objects that a stage left in the workdir, counts them, and says what was skipped and why. It is
written last, so a folder that has a receipt is complete. `digest` identifies the work by its inputs. Equal work is
found instead of repeated.
"""

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from semiscale.storage.documents import Digest, StrictDocument


class Receipt(StrictDocument):
    """The fields that the receipts of all stages share.

    `lineage` has the URIs of this run's receipts up to this one, by role: `plan`, `teacher`, `scores` and so on. A
    later stage finds an earlier receipt in it. It belongs to a run and not to the work, which other runs may find too.
    So the receipt in the folder of the work has none, and an empty one is not written.
    """

    stage: str
    digest: Digest
    folder: str
    seconds: float
    lineage: dict[str, list[str]] = Field(default={})

    @model_serializer(mode="wrap")
    def _without_empty_lineage(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        return fields if self.lineage else {name: value for name, value in fields.items() if name != "lineage"}


class BadSample(StrictDocument):
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str
