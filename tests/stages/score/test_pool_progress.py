"""How far the scan is: this pod's share, the whole pool, the time that is left."""

from semiscale.data.shard import Shard
from semiscale.stages.score.pool_progress import PoolProgress


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shard(number: int) -> Shard:
    """A shard of a hundred bytes."""
    return Shard(uri=f"{number}.tar", name=f"{number}.tar", kind="tar", size_bytes=100, version="1")


def test_a_pods_share_is_of_what_was_left_and_the_time_is_the_pools() -> None:
    shards, clock = [shard(number) for number in range(10)], Clock()
    pace = PoolProgress(shards, 2, clock)
    pace.mark_shard_done(shards[0].digest())
    pace.mark_shard_done(shards[1].digest())
    pace.reset_baseline()
    assert pace.format() == "0% of this pod's share · 20% of the pool", "what an earlier run scored is no pace"
    clock.now = 60.0
    pace.add_bytes(shards[2].digest(), 100)
    assert pace.format() == "25% of this pod's share · 30% of the pool · 7:00 left"
    pace.mark_shard_done(shards[9].digest())
    assert pace.format() == "25% of this pod's share · 40% of the pool · 3:00 left", "another pod's"
    pace.add_bytes(shards[3].digest(), 50)
    assert pace.format() == "38% of this pod's share · 45% of the pool · 2:12 left"


def test_what_is_told_twice_counts_once_and_what_is_of_no_shard_not_at_all() -> None:
    shards, clock = [shard(number) for number in range(2)], Clock()
    pace = PoolProgress(shards, 1, clock)
    clock.now = 1.0
    pace.add_bytes(shards[0].digest(), 80)
    pace.add_bytes(shards[0].digest(), 80)
    pace.mark_shard_done(shards[0].digest())
    pace.mark_shard_done("of an older plan")
    assert pace.format() == "50% of this pod's share · 50% of the pool · 0:01 left"
    pace.add_bytes(shards[1].digest(), 30)
    pace.mark_shard_done(shards[1].digest())
    assert pace.format() == "100% of this pod's share · 100% of the pool · 0:00 left", (
        "with the bytes that are no image's"
    )
