"""The pieces that the packing falls into, each an object that one pod writes: D̂'s tars, and before them the excerpts of
Parquet files."""

from collections.abc import Iterable
from dataclasses import dataclass

from components.pack import excerpts, layout
from components.pack import rows as selected
from components.pack.config import PackConfig
from components.pack.excerpts import Excerpt
from components.pack.layout import Layout
from components.pack.rows import Rows
from components.shared import storage
from components.shared.receipts import SelectionReceipt, load


@dataclass(frozen=True)
class Pieces:
    """The pieces of one packed set by URI, and the rows and the layout that they are made by."""

    folder: str
    rows: Rows
    layout: Layout
    excerpts: dict[str, Excerpt]
    tars: dict[str, int]

    def missing(self, uris: Iterable[str]) -> list[str]:
        """Return those of these pieces that nobody has written yet."""
        there = self.sizes_bytes()
        return [uri for uri in uris if uri not in there]

    def sizes_bytes(self) -> dict[str, int]:
        """Size up what is there: one request a thousand objects."""
        return {entry.uri: entry.size_bytes for entry in storage.entries(self.folder)}


def draw_up(config: PackConfig, folder: str) -> Pieces:
    """Return the pieces of a packed set: the same for all pods. Costs what the layout does (see layout.py)."""
    rows = selected.read(load(config.selection, SelectionReceipt).selection)
    drawn = layout.draw_up(rows, config.packed_tar_bytes, config.seed)
    rows, found = excerpts.draw_up(rows, folder)
    tars = {storage.join(folder, f"packed-{tar:06}.tar"): tar for tar in drawn.tars}
    return Pieces(folder, rows, drawn, {excerpt.uri: excerpt for excerpt in found}, tars)
