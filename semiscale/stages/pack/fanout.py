"""Choose the number of packing pods from the tars that are not written yet."""

from semiscale import storage
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime import pod_count
from semiscale.stages.pack.config import PackConfig, PackFanoutConfig
from semiscale.stages.pack.pack_plan import build_pack_plan
from semiscale.storage.documents import load_document


def plan_pack_fanout(config: PackFanoutConfig) -> FanoutReceipt:
    """Choose how many pods the remaining work keeps busy.

    One pod at a time writes a tar, or an extract of a Parquet file before the tars. One pod runs if an earlier round
    has packed D̂.

    Args:
        config: The plan, the selection and the settings of the packed set.

    Returns:
        The receipt with the number of pods and the reason for it.

    Cost:
        Reads one receipt if D̂ is packed. Otherwise it reads all rows of D̂, like the start of a packing pod.
    """
    pack_config = PackConfig.model_validate(config.model_dump())
    folder = pack_config.folder()

    def count_remaining() -> tuple[int, str]:
        receipt_uri = storage.join(folder, "receipt.json")
        if storage.head(receipt_uri):
            return 0, f"0 of {load_document(receipt_uri, PackReceipt).tars:,} tars to pack"
        pack_plan = build_pack_plan(pack_config, folder)
        tars = pack_plan.list_missing(pack_plan.tars)
        extracts = pack_plan.list_missing(pack_plan.extracts) if tars else []
        # The receipt stores this text.
        reason = f"{len(tars):,} of {len(pack_plan.tars):,} tars to pack"
        if extracts:
            reason += f", from {len(extracts):,} Parquet files"
        return max(len(tars), len(extracts)), reason

    return pod_count.choose_pod_count(config, load_document(config.plan, PlanReceipt).pods, folder, count_remaining)


__all__ = ["PackFanoutConfig", "plan_pack_fanout"]
