"""Report the progress lines, metrics and heartbeats of one pod's scan."""

from collections.abc import Callable

from semiscale.common.cpu import available_cpus
from semiscale.data.shard import Shard
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.score import PartSeconds, ShardAccounting
from semiscale.stages.score.pool_progress import PoolProgress
from semiscale.stages.score.timings import bottleneck_advice, sum_part_seconds


class ScanReporter:
    """Reports what one pod has scored. Measuring begins when it is built.

    Args:
        progress: Bytes of the pool that have scores.
        heartbeat: Keeps the pod's leases alive.
    """

    def __init__(self, progress: PoolProgress, heartbeat: Callable[[], None]) -> None:
        self._pool_progress, self._heartbeat = progress, heartbeat
        self._clocks = PartSeconds()
        progress.reset_baseline()
        self._progress = Progress("score", 0)

    def report_images(self, shard: Shard, images: int, size_bytes: int) -> None:
        """Report images of one shard that were scored.

        Args:
            shard: The shard.
            images: Number of its images that were scored since the last call.
            size_bytes: Encoded bytes of these images.
        """
        self._heartbeat()
        self._pool_progress.add_bytes(shard.digest(), size_bytes)
        self._progress.update(images, self._pool_progress.format())

    def report_shard(self, count: ShardAccounting) -> None:
        """Report a shard whose scores are stored, and the bottleneck of the scan."""
        self._heartbeat()
        self._clocks = sum_part_seconds([self._clocks, count.clocks])
        advice = bottleneck_advice(self._clocks, available_cpus())
        failed = sum(count.failed.values())
        self._progress.add_seconds(**count.clocks.model_dump())
        self._progress.add_failures(failed)
        log_info("score", f"{count.shard}: {count.scored:,} images scored, {failed:,} failed; {advice}")
