"""The pieces that the packing falls into, each an object that one pod writes: D̂'s tars, and before them the excerpts of
Parquet files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from semiscale import storage
from semiscale.receipts.merge import SelectionReceipt
from semiscale.stages.pack import parquet_extracts, tar_layout
from semiscale.stages.pack import selection_columns as selected
from semiscale.stages.pack.config import PackConfig
from semiscale.stages.pack.parquet_extracts import ParquetExtract
from semiscale.stages.pack.selection_columns import SelectionColumns
from semiscale.stages.pack.tar_layout import TarLayout
from semiscale.storage.documents import load_document


@dataclass(frozen=True)
class PackPlan:
    """The pieces of one packed set by URI, and the rows and the layout that they are made by."""

    folder: str
    rows: SelectionColumns
    layout: TarLayout
    excerpts: dict[str, ParquetExtract]
    tars: dict[str, int]

    def missing(self, uris: Iterable[str]) -> list[str]:
        """Return those of these pieces that nobody has written yet."""
        there = self.written_sizes()
        return [uri for uri in uris if uri not in there]

    def written_sizes(self) -> dict[str, int]:
        """Size up what is there: one request a thousand objects."""
        return {entry.uri: entry.size_bytes for entry in storage.list_objects(self.folder)}


def build_pack_plan(config: PackConfig, folder: str) -> PackPlan:
    """Return the pieces of a packed set: the same for all pods. Costs what the layout does (see layout.py)."""
    rows = selected.load_selection(load_document(config.selection, SelectionReceipt).selection)
    drawn = tar_layout.plan_layout(rows, config.packed_tar_bytes, config.seed)
    rows, found = parquet_extracts.plan_extracts(rows, folder)
    tars = {storage.join(folder, f"packed-{tar:06}.tar"): tar for tar in drawn.tars}
    return PackPlan(folder, rows, drawn, {excerpt.uri: excerpt for excerpt in found}, tars)
