"""List the objects of a packed set.

These are the tars of D̂, and the extracts of Parquet files, which are written first. One pod at a time writes an object.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from semiscale import storage
from semiscale.receipts.merge import SelectionReceipt
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.parquet_extracts import ParquetExtract, plan_extracts
from semiscale.stages.pack.selection_columns import SelectionColumns, load_selection
from semiscale.stages.pack.tar_layout import TarLayout, plan_layout
from semiscale.storage.documents import load_document


@dataclass(frozen=True)
class PackPlan:
    """The objects of one packed set.

    Attributes:
        folder: URI of the packed set.
        rows: D̂. Images of Parquet files have locations in the extracts.
        layout: The rows of each tar.
        extracts: The extracts by URI.
        tars: The numbers of the tars by URI.
    """

    folder: str
    rows: SelectionColumns
    layout: TarLayout
    extracts: dict[str, ParquetExtract]
    tars: dict[str, int]

    def list_missing(self, uris: Iterable[str]) -> list[str]:
        """Return those of these objects that no pod has written yet."""
        written = self.written_sizes()
        return [uri for uri in uris if uri not in written]

    def written_sizes(self) -> dict[str, int]:
        """Return the sizes of the written objects, in bytes.

        Cost:
            One request for each thousand objects.
        """
        return {entry.uri: entry.size_bytes for entry in storage.list_objects(self.folder)}


def build_pack_plan(config: PackConfig, folder: str) -> PackPlan:
    """Return the objects of a packed set, which are the same for all pods.

    Args:
        config: The inputs of a pod.
        folder: URI of the packed set.

    Cost:
        Reads all rows of D̂, and costs as much as `plan_layout`.
    """
    rows = load_selection(load_document(config.selection, SelectionReceipt).selection)
    layout = plan_layout(rows, config.packed_tar_bytes, config.seed)
    rows, extracts = plan_extracts(rows, folder)
    tars = {storage.join(folder, f"packed-{tar:06}.tar"): tar for tar in layout.tars}
    return PackPlan(folder, rows, layout, {extract.uri: extract for extract in extracts}, tars)
