"""Score: run the teacher over one pod's units of the pool and leave every image's best classes, ranked.

A unit is committed whole, by its receipt, written last; a pod that died is replaced by one that finds the finished
units and does the rest.
"""

import json
from collections import Counter
from functools import cached_property, partial
from typing import TYPE_CHECKING

from components.score.config import ScoreConfig
from components.shared import storage
from components.shared.errors import Refused
from components.shared.receipts import Clocks, PlanReceipt, ScoreReceipt, TrainReceipt, UnitReceipt, load
from components.shared.shards import Unit
from components.shared.stage import digest, once

if TYPE_CHECKING:
    from components.score.scan import Scan

KEPT_CLASSES = 10  # of each image at least, so that another P can be selected without scoring again


def score(config: ScoreConfig) -> ScoreReceipt:
    """Score the units that fall to this pod, finding those that are finished.

    Memory: one unit's rows, about 230 MB for a million images at ten classes each. Raises Refused where the teacher's
    classes are not the plan's.
    """
    plan = load(config.plan, PlanReceipt)
    teacher = load(config.teacher, TrainReceipt)
    if teacher.classes != plan.classes:
        raise Refused(f"{teacher.checkpoint}: its classes are not the plan's; train the teacher on this labeled set")
    units = [Unit.model_validate(unit) for unit in json.loads(storage.read(plan.units))]
    mine = units[config.pod :: plan.pods]
    kept = min(max(plan.classes_per_image, KEPT_CLASSES), len(plan.classes))
    # Teacher and kept classes are in the name, so that scores of different ones are never mixed.
    folder = storage.join(config.workdir, "stages", "score", f"{teacher.digest}-top{kept}")
    pod = _Pod(config, plan, teacher, kept, len(units))
    receipts = [once(config, UnitReceipt, partial(pod.scan, unit), storage.join(folder, unit.digest)) for unit in mine]
    counts = [shard for receipt in receipts for shard in receipt.shards]
    return ScoreReceipt(
        stage="score",
        digest=digest(folder, config.pod, [unit.digest for unit in mine]),
        folder=folder,
        seconds=round(sum(receipt.seconds for receipt in receipts), 3),
        pod=config.pod,
        teacher=teacher.digest,
        units=len(mine),
        units_found=len(mine) - pod.units_scored,
        listed=sum(count.listed for count in counts),
        scored=sum(count.scored for count in counts),
        failed=dict(sum((Counter(count.failed) for count in counts), Counter())),
        clocks=pod.clocks,
    )


class _Pod:
    """What this pod scores itself. The teacher is loaded when the first unfinished unit asks for it."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt, kept: int, units: int) -> None:
        self._config, self._plan, self._teacher, self._kept, self._units = config, plan, teacher, kept, units
        self.clocks = Clocks()
        self.units_scored = 0

    def scan(self, unit: Unit, folder: str) -> dict[str, object]:
        """Score one unit; returns the fields of its receipt."""
        fields, clocks = self._scan.unit(unit, folder)
        spent = {part: getattr(self.clocks, part) + seconds for part, seconds in clocks.model_dump().items()}
        self.clocks = Clocks(**spent)
        self.units_scored += 1
        return {**fields, "clocks": clocks}

    @cached_property
    def _scan(self) -> "Scan":
        from components.score.scan import Scan  # torch takes seconds to import; finished work is found without it

        return Scan(self._config, self._plan, self._teacher, self._kept, self._units)


__all__ = ["ScoreConfig", "score"]
