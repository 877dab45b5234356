"""Count what a teacher has not scored yet of the pool: how many pods the scan keeps busy."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime import pod_count
from semiscale.stages.score.config import ScoreFanoutConfig
from semiscale.stages.score.score_store import (
    MAX_CONCURRENT_READS,
    list_scored_shards,
    load_shard_groups,
    load_unit_receipt,
    score_folder,
)
from semiscale.storage.documents import load_document


def plan_score_fanout(config: ScoreFanoutConfig) -> FanoutReceipt:
    """Return how many pods the scan is worth: all for a new teacher, one where nothing is new.

    A shard is scored by one pod, and a unit sealed by one. It asks what the scan itself asks when it starts, and costs
    the same: a read for each unit, and a listing of the scored shards where a unit is not sealed.
    """
    plan = load_document(config.plan, PlanReceipt)
    folder = score_folder(config, plan, load_document(config.teacher, TrainReceipt).digest)

    def left() -> tuple[int, str]:
        units = load_shard_groups(plan)
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            receipts = list(pool.map(partial(load_unit_receipt, folder), units))
        unsealed = [unit for unit, receipt in zip(units, receipts, strict=True) if receipt is None]
        scored = set(list_scored_shards(folder)) if unsealed else set()
        shards = sum(shard.digest() not in scored for unit in unsealed for shard in unit.shards)
        what = f"{shards:,} of {plan.shards:,} shards to score, {len(unsealed):,} of {len(units):,} units to seal"
        return max(shards, len(unsealed)), what

    return pod_count.choose_pod_count(config, plan.pods, folder, left)


__all__ = ["ScoreFanoutConfig", "plan_score_fanout"]
