"""The inputs of one pod's packing, and of the count of what there is to pack."""

from typing import ClassVar

from pydantic import Field

from semiscale.common.digest import content_digest
from semiscale.receipts.merge import SelectionReceipt
from semiscale.runtime.stage_config import ReceiptUri, StageConfig
from semiscale.storage.documents import load_document


class PackFanoutConfig(StageConfig):
    """What the packing would find, before there are pods for it."""

    stage: ClassVar[str] = "count"

    plan: ReceiptUri
    """The plan's receipt: it names the shards to copy from, and says how many pods there are at most."""
    selection: ReceiptUri
    """The merge's receipt."""
    image_column: str = "image"
    """Parquet column of the images."""
    packed_tar_bytes: int = Field(default=256 << 20, ge=1)
    """Size of a tar, about."""
    seed: int = 0
    """Of the order."""

    def task_name(self) -> str:
        """What is counted."""
        return "count-unpacked"


class PackConfig(PackFanoutConfig):
    """One pod's share of the packing."""

    stage: ClassVar[str] = "pack"

    count: ReceiptUri = ""
    """The receipt of the count of what is left: how many pods there are. Without: as many as the plan has at most."""
    pod: int = 0
    """Which of the pods this is, from 0."""

    def task_name(self) -> str:
        """Pods pack at the same time."""
        return f"pack-{self.pod}"

    def digest(self) -> str:
        """The packed set depends on the selection, the tars' size and the order alone, not on the pods."""
        selection = load_document(self.selection, SelectionReceipt).digest
        return content_digest(self.stage, selection, self.image_column, self.packed_tar_bytes, self.seed)
