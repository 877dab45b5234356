"""Define the inputs of a packing pod and of the choice of the number of pods."""

from typing import ClassVar

from pydantic import Field

from semiscale.common.digest import content_digest
from semiscale.receipts.merge import SelectionReceipt
from semiscale.runtime.stage_config import ReceiptUri, StageConfig
from semiscale.storage.documents import load_document


class PackFanoutConfig(StageConfig):
    """Inputs of the step that counts unwritten tars and chooses the number of pods."""

    stage: ClassVar[str] = "count"

    plan: ReceiptUri
    """The plan's receipt. It names the shards to copy from and the largest number of pods."""
    selection: ReceiptUri
    """The merge's receipt."""
    image_column: str = "image"
    """Parquet column of the images."""
    packed_tar_bytes: int = Field(default=256 << 20, ge=1)
    """Approximate size of a tar."""
    seed: int = 0
    """Seed of the order."""

    def task_name(self) -> str:
        """Return the name of the task's folder."""
        return "count-unpacked"


class PackConfig(PackFanoutConfig):
    """Inputs of one packing pod."""

    stage: ClassVar[str] = "pack"
    shares_work: ClassVar[bool] = True

    count: ReceiptUri = ""
    """Receipt that holds the number of pods. If it is empty, the plan's maximum is used."""
    pod: int = 0
    """Number of this pod, from 0."""

    def task_name(self) -> str:
        """Return the name of the task's folder, which contains the pod's number."""
        return f"pack-{self.pod}"

    def digest(self) -> str:
        """Return the digest of the selection, the size of the tars and the order.

        The packed set depends on these alone, and not on the pods.
        """
        selection = load_document(self.selection, SelectionReceipt).digest
        return content_digest(self.stage, selection, self.image_column, self.packed_tar_bytes, self.seed)
