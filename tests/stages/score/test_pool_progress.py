"""Test the progress line of the scan: pod's share, whole pool and time left."""

from semiscale.data.shard import Shard
from semiscale.stages.score.pool_progress import PoolProgress


class Clock:
    """Clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_shard(number: int) -> Shard:
    """Return a shard of a hundred bytes."""
    return Shard(uri=f"{number}.tar", name=f"{number}.tar", kind="tar", size_bytes=100, version="1")


def test_share_is_of_the_remaining_bytes_and_time_left_is_of_the_pool() -> None:
    shards, clock = [make_shard(number) for number in range(10)], Clock()
    progress = PoolProgress(shards, 2, clock)
    progress.mark_shard_done(shards[0].digest())
    progress.mark_shard_done(shards[1].digest())
    progress.reset_baseline()
    assert progress.format() == "0% of this pod's share · 20% of the pool", (
        "shards that an earlier run scored do not count for the rate"
    )
    clock.now = 60.0
    progress.add_bytes(shards[2].digest(), 100)
    assert progress.format() == "25% of this pod's share · 30% of the pool · 7:00 left"
    progress.mark_shard_done(shards[9].digest())
    assert progress.format() == "25% of this pod's share · 40% of the pool · 3:00 left", "another pod scored a shard"
    progress.add_bytes(shards[3].digest(), 50)
    assert progress.format() == "38% of this pod's share · 45% of the pool · 2:12 left"


def test_repeated_bytes_count_once_and_unknown_shards_do_not_count() -> None:
    shards, clock = [make_shard(number) for number in range(2)], Clock()
    progress = PoolProgress(shards, 1, clock)
    clock.now = 1.0
    progress.add_bytes(shards[0].digest(), 80)
    progress.add_bytes(shards[0].digest(), 80)
    progress.mark_shard_done(shards[0].digest())
    progress.mark_shard_done("of an older plan")
    assert progress.format() == "50% of this pod's share · 50% of the pool · 0:01 left"
    progress.add_bytes(shards[1].digest(), 30)
    progress.mark_shard_done(shards[1].digest())
    assert progress.format() == "100% of this pod's share · 100% of the pool · 0:00 left", (
        "bytes of a shard that belong to no image count too"
    )
