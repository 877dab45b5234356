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

from components.score.clocks import bound, total, with_write, worked
from components.score.config import ScoreConfig
from components.score.found import READERS, folder_of, kept_classes, scored_shards, sealed, units_of
from components.score.pace import Pace
from components.score.parts import Part, part_uri
from components.score.seal import Sealer
from components.shared import storage
from components.shared.claims import Claims
from components.shared.cores import cores
from components.shared.errors import Refused
from components.shared.progress import Progress, say
from components.shared.receipts import (
    Clocks,
    CountReceipt,
    PlanReceipt,
    ScoreReceipt,
    ShardCount,
    TrainReceipt,
    UnitReceipt,
    load,
)
from components.shared.shards import Columns, Shard, Unit
from components.shared.stage import digest, once
from components.shared.stopping import stopping_on_sigterm

if TYPE_CHECKING:
    from components.score.scan import Scan

POLL_S = 2.0  # how often a pod with nothing to do looks whether the others are alive
LOOK_EVERY_S = 60.0  # how often a pod looks what the others have finished: a thousand shards a request
UNWRITTEN = 2  # shards that wait to be written while others are scanned


Item = TypeVar("Item")


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score shards until none is left, then seal the units; returns when the whole pool has scores.

    Memory: sealing holds one unit, 6.5 GB for the eight million images that it is planned to have, and at most 10 (see
    seal.py). Raises Refused where the teacher's classes are not the plan's or there is no GPU for `decoder: gpu`,
    SemiscaleError where a shard disappeared or changed since it was planned, Stopped on SIGTERM.
    """
    if config.decoder == "gpu":
        from components.score.gpu_decode import refuse_without_gpu  # imports torch, as `_scan` below

        refuse_without_gpu()
    plan = load(config.plan, PlanReceipt)
    teacher = load(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise Refused(f"{teacher.checkpoint}: its classes are not the plan's; train the teacher on this labeled set")
    with stopping_on_sigterm():
        pod = _Pod(config, plan, teacher)
        receipts = pod.all_units()
    # A unit scored when there were more pods counts as one of these pods', so that the pods add up to the pool.
    mine = [receipt for receipt in receipts if receipt.pod % pod.pods == config.pod]
    counts = [shard for receipt in mine for shard in receipt.shards]
    return ScoreReceipt(
        stage="score",
        digest=digest(pod.folder, config.pod, [receipt.digest for receipt in mine]),
        folder=pod.folder,
        seconds=round(sum(receipt.seconds for receipt in mine), 3),
        pod=config.pod,
        teacher=teacher.digest,
        units=len(mine),
        units_found=len(mine) - pod.units_sealed,
        listed=sum(count.listed for count in counts),
        scored=sum(count.scored for count in counts),
        failed=dict(sum((Counter(count.failed) for count in counts), Counter())),
        **worked(counts),
    )


class _Pod:
    """What one pod does. The teacher is loaded when the first unscored shard asks for it."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt) -> None:
        self._config, self._plan, self._teacher, self._units = config, plan, teacher, units_of(plan)
        self.pods = load(config.count, CountReceipt).pods if config.count else plan.pods
        self.folder = folder_of(config, plan, teacher.digest)
        self._claims = Claims(self.folder)
        self._sealer = Sealer(
            folder=self.folder,
            teacher=teacher.digest,
            pod=config.pod,
            images_per_class=config.images_per_class,
            units=len(self._units),
            classes=len(plan.classes),
            advanced=self._claims.advanced,
        )
        self._scored: set[str] = set()
        self._pace = Pace([shard for unit in self._units for shard in unit.shards], self.pods)
        self._looked = 0.0
        self._clocks = Clocks()
        self.units_sealed = 0

    def all_units(self) -> list[UnitReceipt]:
        """Score every shard that has no scores, seal every unit, and return the units' receipts in order."""
        with ThreadPoolExecutor(READERS) as pool:
            receipts = zip(self._units, pool.map(partial(sealed, self.folder), self._units), strict=True)
            found = {unit.digest: receipt for unit, receipt in receipts if receipt}
        waiting = [unit for unit in self._units if unit.digest not in found]
        if waiting:
            self._look()
            self._pace.start()
            self._until_none_is_left("shards", [shard for unit in waiting for shard in unit.shards], self._score)
            self._until_none_is_left("units", waiting, lambda units: self._seal(units, found))
        return [found[unit.digest] for unit in self._units]

    def _until_none_is_left(
        self, what: str, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Item]]
    ) -> None:
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
                    say("score", f"{what} that other pods hold: {before}")
                    said = before
                time.sleep(POLL_S)

    def _look(self) -> None:
        """List the shards that have scores: one look instead of one a shard."""
        self._looked = time.monotonic()
        for shard in scored_shards(self.folder):
            self._found(shard)

    def _found(self, shard: str) -> None:
        self._scored.add(shard)
        self._pace.found(shard)

    def _is_scored(self, shard: Shard) -> bool:
        if shard.digest() not in self._scored and storage.stat(part_uri(self.folder, shard)):
            self._found(shard.digest())
        return shard.digest() in self._scored

    def _score(self, shards: Sequence[Shard]) -> list[Shard]:
        """Score the shards that no pod holds, each committed while the next ones are scanned; returns the others.

        Those that others hold cost one listing: of what another pod has just finished, its claim is gone, and the next
        call finds the scores.
        """
        held: dict[str, ExitStack] = {}
        others = self._claims.held()
        claimed = self._claimed([shard for shard in shards if shard.digest() not in others], held)
        try:
            # Without work the teacher is not loaded.
            if (first := next(claimed, None)) is not None:
                self._commit_all(self._scan.parts(chain([first], claimed)), held)
        finally:
            for claim in held.values():
                claim.close()
        return [shard for shard in shards if shard.digest() not in self._scored]

    def _claimed(self, shards: Sequence[Shard], held: dict[str, ExitStack]) -> Iterator[Shard]:
        """Claim one shard after the other, as they are asked for, passing over those that are scored or held."""
        for shard in shards:
            if time.monotonic() - self._looked > LOOK_EVERY_S:
                self._look()
            if self._is_scored(shard):
                continue
            claim = ExitStack()
            # Whoever held it until now may have finished it since we looked.
            if claim.enter_context(self._claims.claimed(shard.digest())) and not self._is_scored(shard):
                held[shard.digest()] = claim
                yield shard
            else:
                claim.close()

    def _commit_all(self, scanned: Generator[tuple[Shard, Part]], held: dict[str, ExitStack]) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer, closing(scanned):
            writing: deque[Future[None]] = deque()
            try:
                for shard, part in scanned:
                    writing.append(writer.submit(self._commit, shard, part, held))
                    while len(writing) > UNWRITTEN or (writing and writing[0].done()):
                        writing.popleft().result()
                for future in writing:
                    future.result()
            finally:
                writer.shutdown(wait=False, cancel_futures=True)

    def _commit(self, shard: Shard, part: Part, held: dict[str, ExitStack]) -> None:
        started = time.monotonic()
        # A pod that hung and woke up may come second: what is there has been read, perhaps.
        storage.write(part_uri(self.folder, shard), part.encode(self._teacher.digest), if_absent=True)
        self._claims.advanced()
        self._found(shard.digest())
        self._log(with_write(part.count, time.monotonic() - started))
        held.pop(shard.digest()).close()

    def _seal(self, units: Sequence[Unit], found: dict[str, UnitReceipt]) -> list[Unit]:
        """Put the files of each unit together, unless another pod does; returns the units that others hold."""
        others = self._claims.held()
        for unit in [unit for unit in units if unit.digest not in others]:
            folder = storage.join(self.folder, unit.digest)
            if receipt := sealed(self.folder, unit):
                found[unit.digest] = receipt
                continue
            with self._claims.claimed(unit.digest) as mine:
                if mine:
                    found[unit.digest] = once(self._config, UnitReceipt, partial(self._sealer.sealed, unit), folder)
                    self.units_sealed += 1
        return [unit for unit in units if unit.digest not in found]

    def _seen(self, shard: Shard, images: int, size_bytes: int) -> None:
        self._claims.advanced()
        self._pace.scored(shard.digest(), size_bytes)
        self._progress.add(images, self._pace.line())

    def _log(self, count: ShardCount) -> None:
        self._clocks = total([self._clocks, count.clocks])
        waits = bound(self._clocks, cores())
        failed = sum(count.failed.values())
        self._progress.spent(**count.clocks.model_dump())
        self._progress.failed(failed)
        say("score", f"{count.shard}: {count.scored:,} images scored, {failed:,} failed; {waits}")

    @cached_property
    def _scan(self) -> "Scan":
        from components.score.scan import Scan  # torch takes seconds to import; finished work is found without it

        columns = Columns(self._config.image_column, "", self._plan.videos)
        scan = Scan(self._config, self._teacher, kept_classes(self._plan), columns, self.folder, self._seen)
        self._pace.start()
        self._progress = Progress("score", 0)
        return scan


__all__ = ["ScoreConfig", "score"]
