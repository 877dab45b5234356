"""Define receipts, the small JSON documents that stages pass to each other.

A receipt names the objects that a stage wrote to the workdir and counts them. It also lists what was skipped, and why.
It is written last, so a folder that has a receipt is complete. Its `digest` identifies the work by its inputs. A stage
whose work is already stored reuses it.
"""

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from semiscale.data.shard import LOOSE_FILES_MARK
from semiscale.storage.documents import Digest, StrictDocument


class Receipt(StrictDocument):
    """Fields that the receipts of all stages share.

    `lineage` belongs to a run and not to the work, because other runs may reuse the work. Therefore the receipt in the
    folder of the work has no lineage. An empty lineage is not written.

    Attributes:
        stage: Name of the stage that wrote the receipt.
        digest: Digest of the inputs of the work.
        folder: URI of the folder of the work.
        seconds: Time that the work took.
        lineage: URIs of the run's receipts up to this one, by role: `plan`, `teacher`, `scores` and so on. A later
            stage looks up earlier receipts in it.
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
    """Sample that could not be used.

    Attributes:
        shard: Name of its shard.
        key: Key of the sample in the shard.
        reason: Reason in a few words, such as `damaged image`.
    """

    shard: str
    key: str
    reason: str

    def location(self) -> str:
        """Return where a person finds the sample: the path of a loose file, or a shard and the key in it."""
        root, loose_files, _ = self.shard.partition(LOOSE_FILES_MARK)
        return f"{root}{self.key}" if loose_files else f"{self.shard} {self.key}"
