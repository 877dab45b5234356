"""Score: run the teacher over the pool and leave every image's best classes, ranked, unit by unit.

Any number of pods share the shards by claims. A shard's scores are committed whole, as one object named by the shard,
so that no work of a dead pod is done again. When all shards have scores, the pods seal the units: each unit's rows,
ranked, in one file, and a receipt, written last (seal.py).
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from semiscale import storage
from semiscale.common.cpu import available_cpus
from semiscale.common.digest import content_digest
from semiscale.common.errors import InvalidInputError
from semiscale.common.signals import graceful_stop
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt, ShardAccounting, ShardGroupReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.run_once import run_once
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.group_compaction import GroupCompactor
from semiscale.stages.score.pool_progress import PoolProgress
from semiscale.stages.score.score_store import (
    MAX_CONCURRENT_READS,
    list_scored_shards,
    load_shard_groups,
    load_unit_receipt,
    num_kept_classes,
    score_folder,
)
from semiscale.stages.score.shard_scores import ShardScores, shard_scores_uri
from semiscale.stages.score.timings import add_write_seconds, bottleneck_advice, scan_stats, sum_part_seconds
from semiscale.storage.documents import load_document
from semiscale.storage.leases import LeaseManager

if TYPE_CHECKING:
    from semiscale.stages.score.scanner import Scanner

POLL_INTERVAL_S = 2.0  # how often a pod with nothing to do looks whether the others are alive
REFRESH_INTERVAL_S = 60.0  # how often a pod looks what the others have finished: a thousand shards a request
MAX_PENDING_WRITES = 2  # shards that wait to be written while others are scanned


Item = TypeVar("Item")


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score shards until none is left, then seal the units; returns when the whole pool has scores.

    Memory: sealing holds one unit, 6.5 GB for the eight million images that it is planned to have, and at most 10 (see
    seal.py). Raises InvalidInputError where the teacher's classes are not the plan's or there is no GPU for
    `decoder: gpu`,
    SemiscaleError where a shard disappeared or changed since it was planned, Stopped on SIGTERM.
    """
    if config.decoder == "gpu":
        from semiscale.stages.score.gpu_decoding import require_gpu  # imports torch, as `_scan` below

        require_gpu()
    plan = load_document(config.plan, PlanReceipt)
    teacher = load_document(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise InvalidInputError(
            f"{teacher.checkpoint}: its classes are not the plan's; train the teacher on this labeled set"
        )
    with graceful_stop():
        pod = _ScoreWorker(config, plan, teacher)
        receipts = pod.run()
    # A unit scored when there were more pods counts as one of these pods', so that the pods add up to the pool.
    mine = [receipt for receipt in receipts if receipt.pod % pod.pods == config.pod]
    counts = [shard for receipt in mine for shard in receipt.shards]
    return ScoreReceipt(
        stage="score",
        digest=content_digest(pod.folder, config.pod, [receipt.digest for receipt in mine]),
        folder=pod.folder,
        seconds=round(sum(receipt.seconds for receipt in mine), 3),
        pod=config.pod,
        teacher=teacher.digest,
        units=len(mine),
        units_found=len(mine) - pod.units_sealed,
        listed=sum(count.listed for count in counts),
        scored=sum(count.scored for count in counts),
        failed=dict(sum((Counter(count.failed) for count in counts), Counter())),
        **scan_stats(counts),
    )


class _ScoreWorker:
    """What one pod does. The teacher is loaded when the first unscored shard asks for it."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt) -> None:
        self._config, self._plan, self._teacher, self._units = config, plan, teacher, load_shard_groups(plan)
        self.pods = load_document(config.count, FanoutReceipt).pods if config.count else plan.pods
        self.folder = score_folder(config, plan, teacher.digest)
        self._claims = LeaseManager(self.folder)
        self._sealer = GroupCompactor(
            folder=self.folder,
            teacher=teacher.digest,
            pod=config.pod,
            images_per_class=config.images_per_class,
            units=len(self._units),
            classes=len(plan.classes),
            advanced=self._claims.heartbeat,
        )
        self._scored: set[str] = set()
        self._pace = PoolProgress([shard for unit in self._units for shard in unit.shards], self.pods)
        self._looked = 0.0
        self._clocks = PartSeconds()
        self.units_sealed = 0

    def run(self) -> list[ShardGroupReceipt]:
        """Score every shard that has no scores, seal every unit, and return the units' receipts in order."""
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            receipts = zip(self._units, pool.map(partial(load_unit_receipt, self.folder), self._units), strict=True)
            found = {unit.digest: receipt for unit, receipt in receipts if receipt}
        waiting = [unit for unit in self._units if unit.digest not in found]
        if waiting:
            self._refresh()
            self._pace.reset_baseline()
            self._process_all("shards", [shard for unit in waiting for shard in unit.shards], self._score)
            self._process_all("units", waiting, lambda units: self._seal(units, found))
        return [found[unit.digest] for unit in self._units]

    def _process_all(self, what: str, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Item]]) -> None:
        """Go through what is to be done, each pod from its own place in the list, until all is done.

        `work` returns what is left: what other pods hold. It is waited for: should one of them die, its work is taken
        over.
        """
        start = self._config.pod * len(items) // self.pods
        waiting = [*items[start:], *items[:start]]
        said = 0
        while waiting:
            before = len(waiting)
            waiting = work(waiting)
            if waiting and len(waiting) == before:
                if said != before:
                    log_info("score", f"{what} that other pods hold: {before}")
                    said = before
                time.sleep(POLL_INTERVAL_S)

    def _refresh(self) -> None:
        """List the shards that have scores: one look instead of one a shard."""
        self._looked = time.monotonic()
        for shard in list_scored_shards(self.folder):
            self._mark_scored(shard)

    def _mark_scored(self, shard: str) -> None:
        self._scored.add(shard)
        self._pace.mark_shard_done(shard)

    def _is_scored(self, shard: Shard) -> bool:
        if shard.digest() not in self._scored and storage.head(shard_scores_uri(self.folder, shard)):
            self._mark_scored(shard.digest())
        return shard.digest() in self._scored

    def _score(self, shards: Sequence[Shard]) -> list[Shard]:
        """Score the shards that no pod holds, each committed while the next ones are scanned; returns the others.

        Those that others hold cost one listing: of what another pod has just finished, its claim is gone, and the next
        call finds the scores.
        """
        held: dict[str, ExitStack] = {}
        others = self._claims.active()
        claimed = self._claimed([shard for shard in shards if shard.digest() not in others], held)
        try:
            # Without work the teacher is not loaded.
            if (first := next(claimed, None)) is not None:
                self._commit_all(self._scan.scan(chain([first], claimed)), held)
        finally:
            for claim in held.values():
                claim.close()
        return [shard for shard in shards if shard.digest() not in self._scored]

    def _claimed(self, shards: Sequence[Shard], held: dict[str, ExitStack]) -> Iterator[Shard]:
        """Claim one shard after the other, as they are asked for, passing over those that are scored or held."""
        for shard in shards:
            if time.monotonic() - self._looked > REFRESH_INTERVAL_S:
                self._refresh()
            if self._is_scored(shard):
                continue
            claim = ExitStack()
            # Whoever held it until now may have finished it since we looked.
            if claim.enter_context(self._claims.lease(shard.digest())) and not self._is_scored(shard):
                held[shard.digest()] = claim
                yield shard
            else:
                claim.close()

    def _commit_all(self, scanned: Generator[tuple[Shard, ShardScores]], held: dict[str, ExitStack]) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer, closing(scanned):
            writing: deque[Future[None]] = deque()
            try:
                for shard, part in scanned:
                    writing.append(writer.submit(self._commit, shard, part, held))
                    while len(writing) > MAX_PENDING_WRITES or (writing and writing[0].done()):
                        writing.popleft().result()
                for future in writing:
                    future.result()
            finally:
                writer.shutdown(wait=False, cancel_futures=True)

    def _commit(self, shard: Shard, part: ShardScores, held: dict[str, ExitStack]) -> None:
        started = time.monotonic()
        # A pod that hung and woke up may come second: what is there has been read, perhaps.
        storage.write_bytes(shard_scores_uri(self.folder, shard), part.to_parquet(self._teacher.digest), if_absent=True)
        self._claims.heartbeat()
        self._mark_scored(shard.digest())
        self._log(add_write_seconds(part.count, time.monotonic() - started))
        held.pop(shard.digest()).close()

    def _seal(self, units: Sequence[ShardGroup], found: dict[str, ShardGroupReceipt]) -> list[ShardGroup]:
        """Put the files of each unit together, unless another pod does; returns the units that others hold."""
        others = self._claims.active()
        for unit in [unit for unit in units if unit.digest not in others]:
            folder = storage.join(self.folder, unit.digest)
            if receipt := load_unit_receipt(self.folder, unit):
                found[unit.digest] = receipt
                continue
            with self._claims.lease(unit.digest) as mine:
                if mine:
                    found[unit.digest] = run_once(
                        self._config, ShardGroupReceipt, partial(self._sealer.compact, unit), folder
                    )
                    self.units_sealed += 1
        return [unit for unit in units if unit.digest not in found]

    def _seen(self, shard: Shard, images: int, size_bytes: int) -> None:
        self._claims.heartbeat()
        self._pace.add_bytes(shard.digest(), size_bytes)
        self._progress.update(images, self._pace.format())

    def _log(self, count: ShardAccounting) -> None:
        self._clocks = sum_part_seconds([self._clocks, count.clocks])
        waits = bottleneck_advice(self._clocks, available_cpus())
        failed = sum(count.failed.values())
        self._progress.add_seconds(**count.clocks.model_dump())
        self._progress.add_failures(failed)
        log_info("score", f"{count.shard}: {count.scored:,} images scored, {failed:,} failed; {waits}")

    @cached_property
    def _scan(self) -> "Scanner":
        from semiscale.stages.score.scanner import (
            Scanner,  # torch takes seconds to import; finished work is found without it
        )

        columns = SampleFields(self._config.image_column, "", self._plan.is_video)
        scan = Scanner(self._config, self._teacher, num_kept_classes(self._plan), columns, self.folder, self._seen)
        self._pace.reset_baseline()
        self._progress = Progress("score", 0)
        return scan


__all__ = ["ScoreConfig", "score"]
