"""Count what a teacher has not scored yet of the pool: how many pods the scan keeps busy."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from components.score.config import UnscoredConfig
from components.score.found import READERS, folder_of, scored_shards, sealed, units_of
from components.shared import fanout
from components.shared.receipts import CountReceipt, PlanReceipt, TrainReceipt, load


def count_unscored(config: UnscoredConfig) -> CountReceipt:
    """Return how many pods the scan is worth: all for a new teacher, one where nothing is new.

    A shard is scored by one pod, and a unit sealed by one. It asks what the scan itself asks when it starts, and costs
    the same: a read for each unit, and a listing of the scored shards where a unit is not sealed.
    """
    plan = load(config.plan, PlanReceipt)
    folder = folder_of(config, plan, load(config.teacher, TrainReceipt).digest)

    def left() -> tuple[int, str]:
        units = units_of(plan)
        with ThreadPoolExecutor(READERS) as pool:
            receipts = list(pool.map(partial(sealed, folder), units))
        unsealed = [unit for unit, receipt in zip(units, receipts, strict=True) if receipt is None]
        scored = set(scored_shards(folder)) if unsealed else set()
        shards = sum(shard.digest() not in scored for unit in unsealed for shard in unit.shards)
        what = f"{shards:,} of {plan.shards:,} shards to score, {len(unsealed):,} of {len(units):,} units to seal"
        return max(shards, len(unsealed)), what

    return fanout.counted(config, plan.pods, folder, left)


__all__ = ["UnscoredConfig", "count_unscored"]
