"""Track the shards of a pool that have scores, by any pod."""

import time
from collections.abc import Sequence

from semiscale import storage
from semiscale.data.shard import Shard
from semiscale.stages.score.pool_progress import PoolProgress
from semiscale.stages.score.score_store import list_scored_shards
from semiscale.stages.score.shard_scores import shard_scores_uri

# A pod lists the shards of other pods this often. One request lists a thousand shards.
REFRESH_INTERVAL_S = 60.0


class ScoredShards:
    """Tracks which shards have scores, by any pod.

    The stored scores are listed at construction and at every refresh.

    Args:
        folder: Folder of the teacher's scores.
        progress: Receives every shard that has scores.
    """

    def __init__(self, folder: str, progress: PoolProgress) -> None:
        self._folder, self._progress = folder, progress
        self._digests: set[str] = set()
        self._refreshed_at = 0.0
        self._refresh()

    def mark_scored(self, digest: str) -> None:
        """Record that a shard has scores."""
        self._digests.add(digest)
        self._progress.mark_shard_done(digest)

    def is_scored(self, shard: Shard) -> bool:
        """Check a shard, by one request if its scores are not known yet."""
        if time.monotonic() - self._refreshed_at > REFRESH_INTERVAL_S:
            self._refresh()
        if shard.digest() not in self._digests and storage.head(shard_scores_uri(self._folder, shard)):
            self.mark_scored(shard.digest())
        return shard.digest() in self._digests

    def list_unscored(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards without known scores, without a request."""
        return [shard for shard in shards if shard.digest() not in self._digests]

    def _refresh(self) -> None:
        self._refreshed_at = time.monotonic()
        for digest in list_scored_shards(self._folder):
            self.mark_scored(digest)
