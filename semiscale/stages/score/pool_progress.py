"""Track the progress of a pod and of the whole pool, by the bytes of shards."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from semiscale.data.shard import Shard
from semiscale.observability.progress import format_duration


class PoolProgress:
    """Counts the bytes of the pool that have scores, by this pod and by others.

    Any thread may call it. The share of a pod is an equal part of the bytes that had no scores when it started. A fast
    pod scores more.

    Args:
        shards: All shards of the pool.
        pods: Number of pods.
        clock: Returns seconds.
    """

    def __init__(self, shards: Iterable[Shard], pods: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes = {shard.digest(): shard.size_bytes for shard in shards}
        self._scored_bytes: defaultdict[str, int] = defaultdict(int)
        self._own: set[str] = set()
        self._total_bytes, self._done_bytes, self._own_bytes = sum(self._sizes.values()), 0, 0
        self._pods, self._clock, self._lock = pods, clock, threading.Lock()
        self._started, self._done_before = clock(), 0

    def reset_baseline(self) -> None:
        """Start measuring. The pods share the bytes that have no scores now."""
        self._started, self._done_before = self._clock(), self._done_bytes

    def mark_shard_done(self, shard: str) -> None:
        """Record that a shard has scores, by any pod. Shards outside the pool are ignored."""
        if shard in self._sizes:
            self._advance(shard, self._sizes[shard])

    def add_bytes(self, shard: str, size_bytes: int) -> None:
        """Record that this pod scored more bytes of a shard.

        Args:
            shard: Digest of the shard.
            size_bytes: Encoded bytes of the images that were scored since the last call.
        """
        self._own.add(shard)
        self._advance(shard, min(self._scored_bytes[shard] + size_bytes, self._sizes[shard]))

    def _advance(self, shard: str, scored_bytes: int) -> None:
        with self._lock:
            new_bytes, self._scored_bytes[shard] = scored_bytes - self._scored_bytes[shard], scored_bytes
            self._done_bytes += new_bytes
            if shard in self._own:
                self._own_bytes += new_bytes

    def format(self) -> str:
        """Return `40% of this pod's share · 12% of the pool · 1:02:00 left`.

        The time left is that of the whole pool. It is missing until something is scored after the baseline.
        """
        remaining = self._total_bytes - self._done_bytes
        share = (self._total_bytes - self._done_before) / self._pods
        rate = (self._done_bytes - self._done_before) / max(self._clock() - self._started, 1e-9)
        parts = [
            f"{self._own_bytes / max(share, 1):.0%} of this pod's share",
            f"{self._done_bytes / max(self._total_bytes, 1):.0%} of the pool",
        ]
        return " · ".join([*parts, f"{format_duration(remaining / rate)} left"] if rate else parts)
