"""Score a stream of leased shards, and commit the scores of each."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from semiscale import storage
from semiscale.data.shard import Shard
from semiscale.stages.score.scan_reporter import ScanReporter
from semiscale.stages.score.scanner import Scanner
from semiscale.stages.score.shard_scores import ShardScores, shard_scores_uri
from semiscale.stages.score.timings import add_write_seconds

# Shards that wait to be written while others are scanned.
MAX_PENDING_WRITES = 2


class ShardCommitter:
    """Scans shards, and writes the scores of each shard as one object.

    A thread of its own writes.

    Args:
        scanner: Scores shards.
        folder: Folder of the teacher's scores.
        teacher: Digest of the teacher.
        reporter: Logs every committed shard.
        on_commit: Runs in the writing thread when the scores of a shard are stored.
    """

    def __init__(
        self, scanner: Scanner, folder: str, teacher: str, reporter: ScanReporter, on_commit: Callable[[Shard], None]
    ) -> None:
        self._scanner, self._folder, self._teacher = scanner, folder, teacher
        self._reporter, self._on_commit = reporter, on_commit

    def score_and_commit(self, shards: Iterable[Shard]) -> None:
        """Score shards, and commit each one while the next ones are scanned.

        Args:
            shards: Leased shards. They are iterated over in another thread.

        Raises:
            SemiscaleError: Scanning failed. An OSError of the store is raised too.
        """
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        with writer, closing(self._scanner.scan(shards, self._reporter.report_images)) as scanned:
            pending: deque[Future[None]] = deque()
            try:
                for shard, scores in scanned:
                    pending.append(writer.submit(self._commit, shard, scores))
                    while len(pending) > MAX_PENDING_WRITES or (pending and pending[0].done()):
                        pending.popleft().result()
                for future in pending:
                    future.result()
            finally:
                writer.shutdown(wait=False, cancel_futures=True)

    def _commit(self, shard: Shard, scores: ShardScores) -> None:
        started = time.monotonic()
        # A pod that hung may come second. The scores that are there may have been read already, so they stay.
        storage.write_bytes(shard_scores_uri(self._folder, shard), scores.to_parquet(self._teacher), if_absent=True)
        self._reporter.report_shard(add_write_seconds(scores.count, time.monotonic() - started))
        self._on_commit(shard)
