"""Score: run the teacher over the pool and leave every image's best classes, ranked, unit by unit.

Pods share the units by claims. A unit is committed whole, by its receipt, written last; of a unit that a pod died on,
the shards that it had finished are found and the rest is scored by whoever comes next.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING

from components.score import parts
from components.score.claims import Claims
from components.score.config import ScoreConfig
from components.score.parts import Part
from components.shared import scores, storage
from components.shared.errors import Refused, SemiscaleError
from components.shared.progress import say
from components.shared.receipts import Clocks, PlanReceipt, ScoreReceipt, TrainReceipt, UnitReceipt, load
from components.shared.shards import Columns, Shard, Unit
from components.shared.stage import digest, once

if TYPE_CHECKING:
    from components.score.scan import Scan

POLL_S = 2.0  # how often a pod with nothing to do looks whether the others are alive
MAX_FAILURES_LISTED = 100  # of a unit; all are counted
KEPT_CLASSES = 10  # of each image at least, so that another P can be selected without scoring again


class Stopped(SemiscaleError):
    """The pod was told to stop. Shards that were finished are kept; the claim on the unit is given back."""

    exit_code = 128 + signal.SIGTERM


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score units until none is left, finding those that are finished; returns when the whole pool has scores.

    Memory: one unit's rows, about 230 MB for a million images at ten classes each. Raises Refused where the teacher's
    classes are not the plan's, SemiscaleError where a shard disappeared or changed since it was planned, Stopped on
    SIGTERM.
    """
    plan = load(config.plan, PlanReceipt)
    teacher = load(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise Refused(f"{teacher.checkpoint}: its classes are not the plan's; train the teacher on this labeled set")
    units = [Unit.model_validate(unit) for unit in json.loads(storage.read(plan.units))]
    with stopping_on_sigterm():
        pod = _Pod(config, plan, teacher, len(units))
        receipts = pod.all_of(units)
    # A unit scored when there were more pods counts as one of these pods', so that the pods add up to the pool.
    mine = [receipt for receipt in receipts if receipt.pod % plan.pods == config.pod]
    counts = [shard for receipt in mine for shard in receipt.shards]
    return ScoreReceipt(
        stage="score",
        digest=digest(pod.folder, config.pod, [receipt.digest for receipt in mine]),
        folder=pod.folder,
        seconds=round(sum(receipt.seconds for receipt in mine), 3),
        pod=config.pod,
        teacher=teacher.digest,
        units=len(mine),
        units_found=len(mine) - pod.units_scored,
        listed=sum(count.listed for count in counts),
        scored=sum(count.scored for count in counts),
        failed=dict(sum((Counter(count.failed) for count in counts), Counter())),
        clocks=total(receipt.clocks for receipt in mine),
    )


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into Stopped, raised in the main thread at once: claims are given back on the way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("told to stop; what was finished is kept, start the pod again")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: a test or a notebook, which has its own way to stop
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def total(clocks: Iterator[Clocks]) -> Clocks:
    """Add up clocks."""
    spent = dict.fromkeys(Clocks.model_fields, 0.0)
    for one in clocks:
        for part, seconds in one.model_dump().items():
            spent[part] = round(spent[part] + seconds, 3)
    return Clocks(**spent)


def bound(clocks: Clocks, threads: int) -> str:
    """Name what a scan waits for, and what to buy more of. One thread reads and one forwards, `threads` decode."""
    wall = {"read": clocks.read, "decode": clocks.decode / threads, "forward": clocks.forward}
    slowest = max(wall, key=lambda part: wall[part])
    advice = {"read": "a store nearer by, or more pods", "decode": "more CPUs a pod", "forward": "a faster device"}
    return f"{slowest}-bound: faster with {advice[slowest]}"


class _Pod:
    """What one pod does. The teacher is loaded when the first unfinished shard asks for it."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt, units: int) -> None:
        self._config, self._plan, self._teacher, self._units = config, plan, teacher, units
        self._kept = min(max(plan.classes_per_image, KEPT_CLASSES), len(plan.classes))
        # Teacher and kept classes are in the name, so that scores of different ones are never mixed.
        self.folder = storage.join(config.workdir, "stages", "score", f"{teacher.digest}-top{self._kept}")
        self._claims = Claims(self.folder)
        self._finished_bytes = 0
        self._clocks = Clocks()
        self.units_scored = 0

    def all_of(self, units: list[Unit]) -> list[UnitReceipt]:
        """Score whatever is neither finished nor claimed, each pod from its own place in the list, until all is done.

        Waits for units that other pods hold: should one of them die, its unit is taken over.
        """
        start = self._config.pod * len(units) // self._plan.pods
        waiting = [*units[start:], *units[:start]]
        done: dict[str, UnitReceipt] = {}
        while waiting:
            before = len(waiting)
            waiting = [unit for unit in waiting if not self._finished(unit, done)]
            if len(waiting) == before:
                say("score", f"{len(waiting)} units are with other pods")
                time.sleep(POLL_S)
        return [done[unit.digest] for unit in units]

    def _finished(self, unit: Unit, done: dict[str, UnitReceipt]) -> bool:
        folder = storage.join(self.folder, unit.digest)
        found = storage.read_if_there(storage.join(folder, "receipt.json"))
        if found is not None:
            done[unit.digest] = UnitReceipt.model_validate_json(found)
            self._finished_bytes += sum(shard.size_bytes for shard in unit.shards)
            return True
        with self._claims.claimed(unit.digest) as mine:
            if mine:
                done[unit.digest] = once(self._config, UnitReceipt, lambda _: self._unit(unit, folder), folder)
                self.units_scored += 1
        return mine

    def _unit(self, unit: Unit, folder: str) -> dict[str, object]:
        scored = [self._shard(shard, folder) for shard in unit.shards]
        started = time.monotonic()
        names = [shard.name for shard in unit.shards]
        head = scores.head_size(self._config.images_per_class, self._units)
        metadata = {"teacher": self._teacher.digest, "unit": unit.digest, "shards": names}
        uris = {name: storage.join(folder, f"{name}.parquet") for name in ("scores", "samples")}
        storage.write(uris["scores"], scores.encode(parts.rows(scored), len(self._plan.classes), head, metadata))
        storage.write(uris["samples"], parts.samples(scored))
        for shard in unit.shards:
            storage.delete(part_uri(folder, shard))
        spent = total(part.clocks for part in scored)
        return {
            **uris,
            "digest": unit.digest,
            "teacher": self._teacher.digest,
            "pod": self._config.pod,
            "shards": [part.count for part in scored],
            "failures": [failure for part in scored for failure in part.failures][:MAX_FAILURES_LISTED],
            "clocks": spent.model_copy(update={"write": round(spent.write + time.monotonic() - started, 3)}),
        }

    def _shard(self, shard: Shard, folder: str) -> Part:
        """Score one shard, or find it scored by a pod that did not live to finish the unit."""
        uri = part_uri(folder, shard)
        found = storage.read_if_there(uri)
        if found is not None:
            self._finished_bytes += shard.size_bytes
            return parts.decode(found)
        part = self._scan.shard(shard)
        storage.write(uri, part.encode())
        self._finished_bytes += shard.size_bytes
        failed = sum(part.count.failed.values())
        say(
            "score", f"{shard.name}: {part.count.scored:,} images scored, {failed:,} failed; {self._waits(part.clocks)}"
        )
        return part

    def _share(self) -> str:
        """Say how much of the pool has scores, by size, as far as this pod has seen: others may have done more."""
        return f"{self._finished_bytes / max(self._plan.size_bytes, 1):.0%} of the pool"

    def _waits(self, clocks: Clocks) -> str:
        self._clocks = total(iter([self._clocks, clocks]))
        return bound(self._clocks, os.cpu_count() or 1)

    @cached_property
    def _scan(self) -> "Scan":
        from components.score.scan import Scan  # torch takes seconds to import; finished work is found without it

        return Scan(self._teacher, self._kept, Columns(self._config.image_column, ""), self._share)


def part_uri(folder: str, shard: Shard) -> str:
    """Return where a shard's scores are kept until its unit is finished."""
    return storage.join(folder, "parts", f"{shard.digest()}.parquet")


__all__ = ["ScoreConfig", "score"]
