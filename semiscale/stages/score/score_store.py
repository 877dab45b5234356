"""What is there of a teacher's scores: the folder that they are kept in, its scored shards and its sealed units."""

import json
from collections.abc import Iterator

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.data.shard import SampleFields, ShardGroup
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.stages.score.config import ScoreFanoutConfig

MAX_CONCURRENT_READS = 32  # receipts looked for at once: hides an object store's latency
MIN_KEPT_CLASSES = 10  # of each image at least, so that another P can be selected without scoring again


def num_kept_classes(plan: PlanReceipt) -> int:
    """Return how many classes of each image are kept."""
    return min(max(plan.classes_per_image, MIN_KEPT_CLASSES), len(plan.classes))


def score_set_name(config: ScoreFanoutConfig, teacher: str, kept: int) -> str:
    """Name scores by all that they depend on beside the shards, so that different ones are never mixed.

    What is as ever is not named. A teacher that the run trains depends on the column too; a ready-made one does not.
    """
    decoder = "" if config.decoder == "cpu" else f"-{config.decoder}-decoded"
    column = "" if config.image_column == SampleFields.image else f"-column-{content_digest(config.image_column)}"
    return f"{teacher}-top{kept}{decoder}{column}"


def score_folder(config: ScoreFanoutConfig, plan: PlanReceipt, teacher: str) -> str:
    """Return where the scores are kept of the teacher that has this digest."""
    return storage.join(config.workdir, "stages", "score", score_set_name(config, teacher, num_kept_classes(plan)))


def load_shard_groups(plan: PlanReceipt) -> list[ShardGroup]:
    """Read the ledger of the pool."""
    return [ShardGroup.model_validate(unit) for unit in json.loads(storage.read_bytes(plan.units))]


def list_scored_shards(folder: str) -> Iterator[str]:
    """List the digests of the shards that have scores: a thousand a request."""
    for entry in storage.list_objects(storage.join(folder, "parts")):
        yield entry.uri.rpartition("/")[2].removesuffix(".parquet")


def load_unit_receipt(folder: str, unit: ShardGroup) -> ShardGroupReceipt | None:
    """Return a unit's receipt, which is written last; None where it is not sealed yet."""
    found = storage.read_or_none(storage.join(folder, unit.digest, "receipt.json"))
    return None if found is None else ShardGroupReceipt.model_validate_json(found)
