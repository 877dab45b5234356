"""Choose the number of scoring pods from the work that is left."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from semiscale.observability.progress import log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.receipts.validation_warnings import validation_warnings
from semiscale.runtime import pod_count
from semiscale.stages.score.config import ScoreFanoutConfig
from semiscale.stages.score.score_store import (
    MAX_CONCURRENT_READS,
    list_scored_shards,
    load_group_receipt,
    load_shard_groups,
    score_folder,
)
from semiscale.storage.documents import load_document


def plan_score_fanout(config: ScoreFanoutConfig) -> FanoutReceipt:
    """Choose how many pods the remaining work keeps busy.

    A new teacher gets all pods of the plan. One pod runs if nothing is left to score. Only one pod at a time scores a
    shard or compacts a shard group, so more pods than these would idle.

    Args:
        config: The plan, the teacher and the settings that select the score folder.

    Returns:
        The receipt with the number of pods and the reason for it.

    Cost:
        The same as the start of the scan. It is one read per shard group, and a listing of the scored shards if a group
        has no receipt.
    """
    plan = load_document(config.plan, PlanReceipt)
    teacher = load_document(config.teacher, TrainReceipt)
    folder = score_folder(config, plan, teacher.digest)
    # The scan is the expensive part, so the warnings come before it.
    for warning in validation_warnings(plan, teacher):
        log_info("score", f"warning: {warning}")

    def count_remaining() -> tuple[int, str]:
        groups = load_shard_groups(plan)
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            receipts = list(pool.map(partial(load_group_receipt, folder), groups))
        unfinished = [group for group, receipt in zip(groups, receipts, strict=True) if receipt is None]
        scored = set(list_scored_shards(folder)) if unfinished else set()
        num_shards = sum(shard.digest() not in scored for group in unfinished for shard in group.shards)
        # The receipt stores this text.
        reason = (
            f"{num_shards:,} of {plan.shards:,} shards to score, {len(unfinished):,} of {len(groups):,} shard groups "
            "to rank"
        )
        return max(num_shards, len(unfinished)), reason

    return pod_count.choose_pod_count(config, plan.pods, folder, count_remaining)


__all__ = ["ScoreFanoutConfig", "plan_score_fanout"]
