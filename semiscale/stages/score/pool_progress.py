"""How far a pod and the whole pool are, by the bytes of the shards: what the scan's progress line says."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from semiscale.data.shard import Shard
from semiscale.observability.progress import format_duration


class PoolProgress:
    """Counts bytes of the pool that have scores, this pod's and the others'.

    A pod's share is an equal part of what was left when it started; pods that are faster do more than theirs. It may be
    told by several threads.
    """

    def __init__(self, shards: Iterable[Shard], pods: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes = {shard.digest(): shard.size_bytes for shard in shards}
        self._scored: defaultdict[str, int] = defaultdict(int)
        self._own: set[str] = set()
        self._total, self._done, self._mine = sum(self._sizes.values()), 0, 0
        self._pods, self._clock, self._lock = pods, clock, threading.Lock()
        self.reset_baseline()

    def reset_baseline(self) -> None:
        """Take what is left now for the work that is shared, and begin to measure."""
        self._started, self._before = self._clock(), self._done

    def mark_shard_done(self, shard: str) -> None:
        """A whole shard has scores, whoever scored it."""
        if shard in self._sizes:
            self._advance(shard, self._sizes[shard])

    def add_bytes(self, shard: str, size_bytes: int) -> None:
        """This pod has scored so many more bytes of a shard."""
        self._own.add(shard)
        self._advance(shard, min(self._scored[shard] + size_bytes, self._sizes[shard]))

    def _advance(self, shard: str, to: int) -> None:
        with self._lock:
            more, self._scored[shard] = to - self._scored[shard], to
            self._done += more
            if shard in self._own:
                self._mine += more

    def format(self) -> str:
        """Return `40% of this pod's share · 12% of the pool · 1:02:00 left`; the time is that of the whole pool."""
        left = self._total - self._done
        share = (self._total - self._before) / self._pods
        rate = (self._done - self._before) / max(self._clock() - self._started, 1e-9)
        parts = [
            f"{self._mine / max(share, 1):.0%} of this pod's share",
            f"{self._done / max(self._total, 1):.0%} of the pool",
        ]
        return " · ".join([*parts, f"{format_duration(left / rate)} left"] if rate else parts)
