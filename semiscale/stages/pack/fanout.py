"""Count what is not packed yet of D̂: how many pods the packing keeps busy."""

from semiscale import storage
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime import pod_count
from semiscale.stages.pack import pack_plan
from semiscale.stages.pack.config import PackConfig, PackFanoutConfig
from semiscale.storage.documents import load_document


def plan_pack_fanout(config: PackFanoutConfig) -> FanoutReceipt:
    """Return how many pods the packing is worth: one where D̂ was packed in an earlier round.

    A tar is written by one pod, and so is, before the tars, the excerpt of a Parquet file. Of a D̂ that is packed, one
    receipt is read; of another, all rows, which is what a packing pod begins with.
    """
    packing = PackConfig.model_validate(config.model_dump())
    folder = packing.folder()

    def left() -> tuple[int, str]:
        uri = storage.join(folder, "receipt.json")
        if storage.head(uri):
            return 0, f"0 of {load_document(uri, PackReceipt).tars:,} tars to pack"
        drawn = pack_plan.build_pack_plan(packing, folder)
        tars = drawn.missing(drawn.tars)
        files = drawn.missing(drawn.excerpts) if tars else []
        what = f"{len(tars):,} of {len(drawn.tars):,} tars to pack"
        return max(len(tars), len(files)), what + (f", from {len(files):,} Parquet files" if files else "")

    return pod_count.choose_pod_count(config, load_document(config.plan, PlanReceipt).pods, folder, left)


__all__ = ["PackFanoutConfig", "plan_pack_fanout"]
