"""Count what is not packed yet of D̂: how many pods the packing keeps busy."""

from components.pack import pieces
from components.pack.config import PackConfig, UnpackedConfig
from components.shared import fanout, storage
from components.shared.receipts import CountReceipt, PackReceipt, PlanReceipt, load


def count_unpacked(config: UnpackedConfig) -> CountReceipt:
    """Return how many pods the packing is worth: one where D̂ was packed in an earlier round.

    A tar is written by one pod, and so is, before the tars, the excerpt of a Parquet file. Of a D̂ that is packed, one
    receipt is read; of another, all rows, which is what a packing pod begins with.
    """
    packing = PackConfig.model_validate(config.model_dump())
    folder = packing.folder()

    def left() -> tuple[int, str]:
        uri = storage.join(folder, "receipt.json")
        if storage.stat(uri):
            return 0, f"0 of {load(uri, PackReceipt).tars:,} tars to pack"
        drawn = pieces.draw_up(packing, folder)
        tars = drawn.missing(drawn.tars)
        files = drawn.missing(drawn.excerpts) if tars else []
        what = f"{len(tars):,} of {len(drawn.tars):,} tars to pack"
        return max(len(tars), len(files)), what + (f", from {len(files):,} Parquet files" if files else "")

    return fanout.counted(config, load(config.plan, PlanReceipt).pods, folder, left)


__all__ = ["UnpackedConfig", "count_unpacked"]
