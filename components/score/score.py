"""Score: run the teacher over the pool and leave every image's best classes, ranked, unit by unit.

Any number of pods share the shards by claims. A shard's scores are committed whole, as one object named by the shard,
so that no work of a dead pod is done again. When all shards have scores, the pods seal the units: each unit's rows,
ranked, in one file, and a receipt, written last.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from components.score import parts
from components.score.config import ScoreConfig
from components.score.parts import Part
from components.shared import scores, storage
from components.shared.claims import Claims
from components.shared.errors import Refused, SemiscaleError
from components.shared.progress import say
from components.shared.receipts import Clocks, PlanReceipt, ScoreReceipt, TrainReceipt, UnitReceipt, load
from components.shared.shards import Columns, Shard, Unit
from components.shared.stage import digest, once

if TYPE_CHECKING:
    from components.score.scan import Scan

POLL_S = 2.0  # how often a pod with nothing to do looks whether the others are alive
MAX_FAILURES_LISTED = 100  # of a unit; all are counted
READERS = 32  # parts read at once: hides an object store's latency
KEPT_CLASSES = 10  # of each image at least, so that another P can be selected without scoring again


Item = TypeVar("Item")


class Stopped(SemiscaleError):
    """The pod was told to stop. Shards that were finished are kept; the claim on the one in work is given back."""

    exit_code = 128 + signal.SIGTERM


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score shards until none is left, then seal the units; returns when the whole pool has scores.

    Memory: sealing holds one unit, 6.5 GB and 52 CPU-seconds for eight million images at ten classes each. Raises
    Refused where the teacher's classes are not the plan's, SemiscaleError where a shard disappeared or changed since it
    was planned, Stopped on SIGTERM.
    """
    plan = load(config.plan, PlanReceipt)
    teacher = load(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise Refused(f"{teacher.checkpoint}: its classes are not the plan's; train the teacher on this labeled set")
    units = [Unit.model_validate(unit) for unit in json.loads(storage.read(plan.units))]
    with stopping_on_sigterm():
        pod = _Pod(config, plan, teacher, units)
        receipts = pod.all_units()
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
        units_found=len(mine) - pod.units_sealed,
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
    """What one pod does. The teacher is loaded when the first unscored shard asks for it."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt, units: list[Unit]) -> None:
        self._config, self._plan, self._teacher, self._units = config, plan, teacher, units
        self._kept = min(max(plan.classes_per_image, KEPT_CLASSES), len(plan.classes))
        # Teacher and kept classes are in the name, so that scores of different ones are never mixed.
        self.folder = storage.join(config.workdir, "stages", "score", f"{teacher.digest}-top{self._kept}")
        self._claims = Claims(self.folder)
        self._scored: set[str] = set()
        self._finished_bytes = 0
        self._clocks = Clocks()
        self.units_sealed = 0

    def all_units(self) -> list[UnitReceipt]:
        """Score every shard that has no scores, seal every unit, and return the units' receipts in order."""
        sealed = {unit.digest: receipt for unit in self._units if (receipt := self._sealed(unit))}
        waiting = [unit for unit in self._units if unit.digest not in sealed]
        if waiting:
            self._find_scored()
            self._until_none_is_left("shards", [shard for unit in waiting for shard in unit.shards], self._shard)
            self._until_none_is_left("units", waiting, lambda unit: self._seal(unit, sealed))
        return [sealed[unit.digest] for unit in self._units]

    def _find_scored(self) -> None:
        """List the shards that have scores: one look instead of one a shard."""
        for entry in storage.entries(storage.join(self.folder, "parts")):
            self._scored.add(entry.uri.rpartition("/")[2].removesuffix(".parquet"))

    def _until_none_is_left(self, what: str, items: Sequence[Item], finished: Callable[[Item], bool]) -> None:
        """Go through what is to be done, each pod from its own place in the list, until all is done.

        What other pods hold is waited for: should one of them die, its work is taken over.
        """
        start = self._config.pod * len(items) // self._plan.pods
        waiting = [*items[start:], *items[:start]]
        while waiting:
            before = len(waiting)
            waiting = [item for item in waiting if not finished(item)]
            if len(waiting) == before:
                say("score", f"{what} that other pods hold: {len(waiting)}")
                time.sleep(POLL_S)

    def _shard(self, shard: Shard) -> bool:
        """Score a shard; returns False where another pod holds it."""
        uri = part_uri(self.folder, shard)
        if shard.digest() in self._scored or storage.stat(uri):
            self._finished_bytes += shard.size_bytes
            return True
        with self._claims.claimed(shard.digest()) as mine:
            # Whoever held it until now may have finished it since we looked.
            if mine and not storage.stat(uri):
                part = self._scan.shard(shard)
                storage.write(uri, part.encode())
                self._log(part)
        if mine:
            self._finished_bytes += shard.size_bytes
        return mine

    def _sealed(self, unit: Unit) -> UnitReceipt | None:
        found = storage.read_if_there(storage.join(self.folder, unit.digest, "receipt.json"))
        return None if found is None else UnitReceipt.model_validate_json(found)

    def _seal(self, unit: Unit, sealed: dict[str, UnitReceipt]) -> bool:
        """Put a unit's files together, unless another pod does."""
        if receipt := self._sealed(unit):
            sealed[unit.digest] = receipt
            return True
        folder = storage.join(self.folder, unit.digest)
        with self._claims.claimed(unit.digest) as mine:
            if mine:
                sealed[unit.digest] = once(self._config, UnitReceipt, lambda _: self._unit(unit, folder), folder)
                self.units_sealed += 1
        return mine

    def _unit(self, unit: Unit, folder: str) -> dict[str, object]:
        started = time.monotonic()
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(storage.read, [part_uri(self.folder, shard) for shard in unit.shards]))
        scored = [parts.decode(data) for data in read]
        del read
        head = scores.head_size(self._config.images_per_class, len(self._units))
        metadata = {"teacher": self._teacher.digest, "unit": unit.digest, "shards": [one.name for one in unit.shards]}
        files = parts.unit_files(scored, head, len(self._plan.classes), metadata)
        uris = {name: storage.join(folder, f"{name}.parquet") for name in files}
        for name, data in files.items():
            storage.write(uris[name], data)
        spent = total(part.clocks for part in scored)
        sealing_s = round(time.monotonic() - started, 3)
        return {
            **uris,
            "digest": unit.digest,
            "teacher": self._teacher.digest,
            "pod": self._config.pod,
            "seconds": round(sum(part.seconds for part in scored) + sealing_s, 3),
            "shards": [part.count for part in scored],
            "failures": [failure for part in scored for failure in part.failures][:MAX_FAILURES_LISTED],
            "clocks": spent.model_copy(update={"write": round(spent.write + sealing_s, 3)}),
        }

    def _log(self, part: Part) -> None:
        self._clocks = total(iter([self._clocks, part.clocks]))
        waits = bound(self._clocks, os.cpu_count() or 1)
        failed = sum(part.count.failed.values())
        say("score", f"{part.count.shard}: {part.count.scored:,} images scored, {failed:,} failed; {waits}")

    def _share(self) -> str:
        """Say how much of the pool has scores, by size, as far as this pod has seen: others may have done more."""
        return f"{self._finished_bytes / max(self._plan.size_bytes, 1):.0%} of the pool"

    @cached_property
    def _scan(self) -> "Scan":
        from components.score.scan import Scan  # torch takes seconds to import; finished work is found without it

        return Scan(self._teacher, self._kept, Columns(self._config.image_column, ""), self._share)


def part_uri(folder: str, shard: Shard) -> str:
    """Return where a shard's scores are kept."""
    return storage.join(folder, "parts", f"{shard.digest()}.parquet")


__all__ = ["ScoreConfig", "score"]
