"""Write a plan and a selection without their stages.

Tests of packing start from them. It takes milliseconds.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semiscale.common.digest import content_digest
from semiscale.data import listing, reader
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields, ShardGroup
from semiscale.receipts.merge import ClassSelectionStats, PoolAccounting, SelectionReceipt
from semiscale.receipts.plan import PlanReceipt

CLASSES = 3
NO_SPLIT = LabeledSplit(digest="", index="", shards="", samples=0, class_counts=[])


def write_selection(root: Path, pool: str, per_class: int, pods: int = 2) -> tuple[str, str]:
    """Select images of a pool at random, some of them for several classes.

    Args:
        root: The folder of the receipts.
        pool: The URI of the pool.
        per_class: The number of images of each class.
        pods: The number of pods of the plan.

    Returns:
        The paths of the plan and of the receipt of the selection.
    """
    shards = listing.list_shards([pool])
    rows = [
        {
            "shard": shard.name,
            "index": sample.index,
            "key": sample.key,
            "uri": sample.uri,
            "offset": sample.offset,
            "size_bytes": len(sample.image),
        }
        for shard in shards
        for sample in reader.iter_samples(shard, SampleFields("image", ""))
    ]
    rng = np.random.default_rng(0)
    selected = [rng.permutation(len(rows))[:per_class] for _ in range(CLASSES)]
    table = [
        {"class": label, "rank": rank, "score": 0.0, "position": 0, **rows[index]}
        for label, indexes in enumerate(selected)
        for rank, index in enumerate(indexes)
    ]
    (root / "selection.parquet").write_bytes(encode_rows(table))
    (root / "units.json").write_text(json.dumps([ShardGroup(digest="unit", shards=shards).model_dump()]))
    plan, selection = build_receipts(root, content_digest([row["key"] for row in table]), len(table), pods)
    for name, receipt in (("plan", plan), ("selection", selection)):
        (root / f"{name}.json").write_text(receipt.model_dump_json())
    return str(root / "plan.json"), str(root / "selection.json")


def encode_rows(rows: list[dict[str, object]]) -> bytes:
    """Encode the rows of a selection as the merge does."""
    table = pa.Table.from_pylist(rows)
    narrow = table.set_column(0, "class", table["class"].cast(pa.uint16()))
    buffer = io.BytesIO()
    pq.write_table(narrow, buffer, row_group_size=50)
    return buffer.getvalue()


def build_receipts(root: Path, identity: str, images: int, pods: int) -> tuple[PlanReceipt, SelectionReceipt]:
    """Return the receipts of the plan and of the selection."""
    common = {"digest": identity, "folder": str(root), "seconds": 0.0, "failed": {}}
    plan = PlanReceipt(
        **common, stage="plan", name="trial", pool_digest="", classes=[*"abc"], train=NO_SPLIT, validation=NO_SPLIT,
        test=NO_SPLIT, units=str(root / "units.json"), shards=0, size_bytes=0, pods=pods, classes_per_image=3,
        failures=[], notes=[], run={},
    )  # fmt: skip
    selection = SelectionReceipt(
        **common, stage="merge", selection=str(root / "selection.parquet"), teacher="", images=images,
        unique_images=images, changed_by_last_tenth=0.1, images_per_class=images // CLASSES, classes_per_image=3,
        per_class=[
            ClassSelectionStats(name=name, wanted=1, found=1, unique=1, full=True, last_score=0.0) for name in "abc"
        ],
        ledger=PoolAccounting(listed=0, scored=0, failed=0, removed=0), bytes_read=0,
    )  # fmt: skip
    return plan, selection
