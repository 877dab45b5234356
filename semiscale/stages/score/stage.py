"""Score the pool: store the teacher's best classes of every image.

Any number of pods share the shards by leases. The scores of a shard are committed as one object, named by the shard,
so work that a dead pod has committed is not repeated. When all shards have scores, the pods compact the shard groups.
A group gets one file of ranked rows and a receipt, which is written last.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.common.signals import graceful_stop
from semiscale.config.resources import IndexedJobSettings
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ScoreReceipt, ShardGroupReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.follower import end_when_abandoned
from semiscale.runtime.indexed_job import run_indexed_job
from semiscale.runtime.run_once import run_once
from semiscale.runtime.shared_work import SharedWork, rotate_to_start
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.group_compaction import GroupCompactor
from semiscale.stages.score.pool_progress import PoolProgress
from semiscale.stages.score.scan_reporter import ScanReporter
from semiscale.stages.score.score_store import (
    MAX_CONCURRENT_READS,
    load_group_receipt,
    load_shard_groups,
    num_kept_classes,
    score_folder,
)
from semiscale.stages.score.scored_shards import ScoredShards
from semiscale.stages.score.timings import scan_stats
from semiscale.storage.documents import load_document
from semiscale.storage.leases import LeaseManager

if TYPE_CHECKING:
    from semiscale.stages.score.shard_committer import ShardCommitter


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score shards and compact shard groups until the whole pool is done.

    Args:
        config: The inputs of this pod.

    Returns:
        The receipt of this pod's share of the pool. A pod that follows a Job has the whole pool as its share.

    Raises:
        InvalidInputError: The teacher's classes differ from the plan's, or `decoder: gpu` finds no GPU.
        SemiscaleError: A shard disappeared or changed after it was planned.
        AbandonedError: No task follows the Job of this pod any more.
        TerminatedError: SIGTERM arrived.

    Cost:
        Compaction holds one shard group: 6.5 GB for the planned eight million images, and 10 GB at most.
    """
    launch = IndexedJobSettings.from_env()
    if config.decoder == "gpu" and not launch:
        # Import torch only here. Finished work is recognised without it.
        from semiscale.stages.score.gpu_decoding import require_gpu

        require_gpu()
    plan = load_document(config.plan, PlanReceipt)
    teacher = load_document(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise InvalidInputError(
            "SEMI-E270",
            f"{teacher.checkpoint}: its classes differ from the plan's. Train the teacher on this labeled set.",
        )
    folder = score_folder(config, plan, teacher.digest)
    groups = load_shard_groups(plan)
    with graceful_stop(), end_when_abandoned(folder, config, config.plan):
        if launch:
            run_indexed_job(
                config, config.count, launch, folder, lambda: len(_load_receipts(folder, groups)) == len(groups)
            )
            pods = 1
        else:
            pods = load_document(config.count, FanoutReceipt).pods if config.count else plan.pods
        receipts = _load_receipts(folder, groups)
        unfinished = [group for group in groups if group.digest not in receipts]
        num_compacted = 0
        if unfinished:
            leases = LeaseManager(folder)
            progress = PoolProgress([shard for group in groups for shard in group.shards], pods)
            _ShardScoring(config, plan, teacher, folder, leases, progress).run(
                rotate_to_start([shard for group in unfinished for shard in group.shards], config.pod, pods)
            )
            compactor = GroupCompactor(
                folder=folder,
                teacher=teacher.digest,
                pod=config.pod,
                images_per_class=config.images_per_class,
                num_groups=len(groups),
                classes=len(plan.classes),
                heartbeat=leases.heartbeat,
            )
            num_compacted = _compact_groups(
                config, compactor, leases, rotate_to_start(unfinished, config.pod, pods), receipts
            )

    # An earlier run may have had more pods. Their groups count for these pods, so that the pods add up to the pool.
    own = [receipts[group.digest] for group in groups if receipts[group.digest].pod % pods == config.pod]
    counts = [shard for receipt in own for shard in receipt.shards]
    return ScoreReceipt(
        stage="score",
        digest=content_digest(folder, config.pod, [receipt.digest for receipt in own]),
        folder=folder,
        seconds=round(sum(receipt.seconds for receipt in own), 3),
        pod=config.pod,
        teacher=teacher.digest,
        units=len(own),
        units_found=len(own) - num_compacted,
        listed=sum(count.listed for count in counts),
        scored=sum(count.scored for count in counts),
        failed=dict(sum((Counter(count.failed) for count in counts), Counter())),
        **scan_stats(counts),
    )


def _load_receipts(folder: str, groups: list[ShardGroup]) -> dict[str, ShardGroupReceipt]:
    """Return the receipts of the finished shard groups, by the digest of the group."""
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        loaded = pool.map(partial(load_group_receipt, folder), groups)
        return {group.digest: receipt for group, receipt in zip(groups, loaded, strict=True) if receipt}


class _ShardScoring:
    """Scores the shards that have no scores, and shares them with other pods.

    The teacher is loaded when the first unscored shard is leased.

    Args:
        config: The inputs of this pod.
        plan: The plan's receipt.
        teacher: The teacher's receipt.
        folder: URI of the score folder.
        leases: Leases of the score folder.
        progress: Bytes of the pool that have scores.
    """

    def __init__(
        self,
        config: ScoreConfig,
        plan: PlanReceipt,
        teacher: TrainReceipt,
        folder: str,
        leases: LeaseManager,
        progress: PoolProgress,
    ) -> None:
        self._config, self._plan, self._teacher, self._folder = config, plan, teacher, folder
        self._leases, self._progress = leases, progress
        self._scored = ScoredShards(folder, progress)
        progress.reset_baseline()
        self._work = SharedWork[Shard](
            leases,
            "score",
            "shards",
            lease_name=Shard.digest,
            list_unfinished=self._scored.list_unscored,
            is_done=self._scored.is_scored,
            is_done_under_lease=self._scored.is_scored,
        )

    def run(self, shards: list[Shard]) -> None:
        """Score shards until all have scores, by any pod."""
        self._work.run(self._scored.list_unscored(shards), self._score)

    def _score(self, leased: Iterator[Shard]) -> None:
        # Without a free shard the teacher is not loaded.
        if (first := next(leased, None)) is not None:
            self._committer.score_and_commit(chain([first], leased))

    def _on_commit(self, shard: Shard) -> None:
        self._scored.mark_scored(shard.digest())
        self._work.release(shard)

    @cached_property
    def _committer(self) -> "ShardCommitter":
        # The import of torch takes seconds. Finished work is recognised without it.
        from semiscale.stages.score.scanner import Scanner
        from semiscale.stages.score.shard_committer import ShardCommitter

        columns = SampleFields(self._config.image_column, "", self._plan.is_video)
        scanner = Scanner(self._config, self._teacher, num_kept_classes(self._plan), columns, self._folder)
        # The reporter starts its clocks, so it is built after the teacher has been loaded.
        reporter = ScanReporter(self._progress, self._leases.heartbeat)
        return ShardCommitter(scanner, self._folder, self._teacher.digest, reporter, self._on_commit)


def _compact_groups(
    config: ScoreConfig,
    compactor: GroupCompactor,
    leases: LeaseManager,
    groups: list[ShardGroup],
    receipts: dict[str, ShardGroupReceipt],
) -> int:
    """Compact shard groups until all have receipts, by any pod.

    Args:
        config: The inputs of this pod.
        compactor: Writes the files of a group.
        leases: Leases of the score folder.
        groups: Groups without a receipt, beginning with this pod's first one.
        receipts: Receipts by the digest of the group. The receipts of `groups` are added.

    Returns:
        The number of groups that this pod compacted.
    """
    num_compacted = 0

    def has_receipt(group: ShardGroup) -> bool:
        if receipt := load_group_receipt(compactor.folder, group):
            receipts[group.digest] = receipt
        return receipt is not None

    def compact(group: ShardGroup) -> None:
        nonlocal num_compacted
        # `run_once` checks again whether the previous holder has finished the group.
        folder = storage.join(compactor.folder, group.digest)
        receipts[group.digest] = run_once(config, ShardGroupReceipt, partial(compactor.compact, group), folder)
        num_compacted += 1

    work = SharedWork[ShardGroup](
        leases,
        "score",
        "shard groups",
        lease_name=lambda group: group.digest,
        list_unfinished=lambda remaining: [group for group in remaining if group.digest not in receipts],
        is_done=has_receipt,
    )
    work.run_each(groups, compact)
    return num_compacted


__all__ = ["ScoreConfig", "score"]
