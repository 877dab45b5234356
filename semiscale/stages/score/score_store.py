"""Locate and list the stored scores of a teacher."""

import json
from collections.abc import Iterator

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.data.shard import SampleFields, ShardGroup
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.stages.score.config import ScoreFanoutConfig

# Receipts, or scores of shards, that are read at the same time, to hide the latency of an object store.
MAX_CONCURRENT_READS = 32
# Each image keeps at least so many classes. A larger P can then be selected without scoring again.
MIN_KEPT_CLASSES = 10


def num_kept_classes(plan: PlanReceipt) -> int:
    """Return how many classes of each image are stored."""
    return min(max(plan.classes_per_image, MIN_KEPT_CLASSES), len(plan.classes))


def score_set_name(config: ScoreFanoutConfig, teacher: str, kept: int) -> str:
    """Name a set of scores by everything that its values depend on, except the shards.

    Scores of different settings are therefore never mixed. Settings at their default are not part of the name. The
    digest of a trained teacher already depends on the image column. The digest of a ready-made teacher does not.

    Args:
        config: The settings.
        teacher: Digest of the teacher.
        kept: Number of classes that each image keeps.
    """
    decoder = "" if config.decoder == "cpu" else f"-{config.decoder}-decoded"
    column = "" if config.image_column == SampleFields.image else f"-column-{content_digest(config.image_column)}"
    return f"{teacher}-top{kept}{decoder}{column}"


def score_folder(config: ScoreFanoutConfig, plan: PlanReceipt, teacher: str) -> str:
    """Return the URI of the score folder.

    Args:
        config: The workdir and the settings that scores depend on.
        plan: The plan, which sets the number of stored classes.
        teacher: Digest of the teacher.
    """
    return storage.join(config.workdir, "stages", "score", score_set_name(config, teacher, num_kept_classes(plan)))


def load_shard_groups(plan: PlanReceipt) -> list[ShardGroup]:
    """Read all shard groups of the pool."""
    return [ShardGroup.model_validate(group) for group in json.loads(storage.read_bytes(plan.units))]


def list_scored_shards(folder: str) -> Iterator[str]:
    """Yield the digests of the shards that have scores.

    Cost:
        One request for every thousand shards.
    """
    for entry in storage.list_objects(storage.join(folder, "parts")):
        yield entry.uri.rpartition("/")[2].removesuffix(".parquet")


def load_group_receipt(folder: str, group: ShardGroup) -> ShardGroupReceipt | None:
    """Load the receipt of a shard group.

    Args:
        folder: Folder of the teacher's scores.
        group: The shard group.

    Returns:
        The receipt, or None if the group is not finished. The receipt is written last.
    """
    data = storage.read_or_none(storage.join(folder, group.digest, "receipt.json"))
    return None if data is None else ShardGroupReceipt.model_validate_json(data)
