"""What is there of a teacher's scores: the folder that they are kept in, its scored shards and its sealed units."""

import json
from collections.abc import Iterator

from components.score.config import UnscoredConfig
from components.shared import storage
from components.shared.receipts import PlanReceipt, UnitReceipt
from components.shared.shards import Columns, Unit
from components.shared.stage import digest

READERS = 32  # receipts looked for at once: hides an object store's latency
KEPT_CLASSES = 10  # of each image at least, so that another P can be selected without scoring again


def kept_classes(plan: PlanReceipt) -> int:
    """Return how many classes of each image are kept."""
    return min(max(plan.classes_per_image, KEPT_CLASSES), len(plan.classes))


def name_of(config: UnscoredConfig, teacher: str, kept: int) -> str:
    """Name scores by all that they depend on beside the shards, so that different ones are never mixed.

    What is as ever is not named. A teacher that the run trains depends on the column too; a ready-made one does not.
    """
    decoder = "" if config.decoder == "cpu" else f"-{config.decoder}-decoded"
    column = "" if config.image_column == Columns.image else f"-column-{digest(config.image_column)}"
    return f"{teacher}-top{kept}{decoder}{column}"


def folder_of(config: UnscoredConfig, plan: PlanReceipt, teacher: str) -> str:
    """Return where the scores are kept of the teacher that has this digest."""
    return storage.join(config.workdir, "stages", "score", name_of(config, teacher, kept_classes(plan)))


def units_of(plan: PlanReceipt) -> list[Unit]:
    """Read the ledger of the pool."""
    return [Unit.model_validate(unit) for unit in json.loads(storage.read(plan.units))]


def scored_shards(folder: str) -> Iterator[str]:
    """List the digests of the shards that have scores: a thousand a request."""
    for entry in storage.entries(storage.join(folder, "parts")):
        yield entry.uri.rpartition("/")[2].removesuffix(".parquet")


def sealed(folder: str, unit: Unit) -> UnitReceipt | None:
    """Return a unit's receipt, which is written last; None where it is not sealed yet."""
    found = storage.read_if_there(storage.join(folder, unit.digest, "receipt.json"))
    return None if found is None else UnitReceipt.model_validate_json(found)
