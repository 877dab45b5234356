"""Test that results depend on the data and the seed, and not on where the files lie."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.data.labeled import load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, Shard
from semiscale.scores.score_file import ScoreFileReader
from semiscale.stages.plan import shard_groups
from semiscale.stages.plan.stage import PlanConfig
from semiscale.stages.train.distributed import DistributedContext
from semiscale.stages.train.input_pipeline.dataset import TrainDataset
from tests.support import sample_images
from tests.support.stages import Stages

SHARDS = 10


def copy_run(content: dict[str, Any], data: Path, target: str) -> PlanConfig:
    """Copy the data of a run below another URI, and return the run file with the new URIs."""
    for path in sorted(data.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(target, str(path.relative_to(data))), path.read_bytes())
    text = json.dumps({**content, "workdir": storage.join(target, "work", "of", "another", "name")})
    return PlanConfig.model_validate_json(text.replace(str(data), target))


def read_results(run: Stages) -> dict[str, object]:
    """Run the stages up to the fine-tuned students, and return their results without URIs."""
    data = TrainDataset(
        load_split(run.plan.train),
        SampleFields(),
        Preprocessing(resolution=8, augmentation="shift-flip"),
        0,
        DistributedContext(),
    )
    batches = list(islice(data.batches(12, 8), 8))
    groups = [receipt for part in run.scores for receipt in load_groups(part.folder)]
    trained = [run.teacher, run.pretrained, *run.students, *run.baselines]
    return {
        "batches": [(batch.keys, batch.labels_B.tolist(), batch.images_BHWC.tobytes()) for batch in batches],
        "classes of the split": (run.plan.train.class_counts, run.plan.validation.class_counts),
        "scores": sorted(groups),
        "selection": [{name: row[name] for name in row if name != "uri"} for row in run.selection_rows()],
        "tars": [storage.read_bytes(shard.uri) for shard in packed_shards(run)],
        "weights": [storage.read_bytes(receipt.checkpoint) for receipt in trained],
        "validation": [[point.validation_top1 for point in receipt.curve] for receipt in trained],
        "test": {name: model.top1 for name, model in run.evaluation.models.items()},
    }


def load_groups(folder: str) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Return the names of the shards and all rows of each score file, with the codes of the samples."""
    uris = [entry.uri for entry in storage.list_objects(folder) if entry.uri.endswith("/scores.parquet")]
    groups = []
    for uri in uris:
        with storage.open_object(uri) as file:
            groups.append((ScoreFileReader(uri).shard_names, pq.read_table(file).to_pylist()))
    return groups


def packed_shards(run: Stages) -> list[Shard]:
    """Return the packed tars in their order."""
    return [Shard.model_validate(item["shard"]) for item in json.loads(storage.read_bytes(run.packed.shards))]


@pytest.mark.parametrize("images_per_group", [50, 1000])
def test_a_run_from_a_bucket_has_the_results_of_a_run_from_a_disk(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, images_per_group: int
) -> None:
    """The bucket has another prefix, workdir and versions. The plan holds out the validation images in both."""
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", images_per_group)
    content = sample_images.write_run(tmp_path, validation=[], validation_fraction=0.25, teacher_images_processed=120)
    sample_images.write_pool(tmp_path / "data" / "pool", SHARDS, 12)
    on_disk = Stages.on(PlanConfig.model_validate(content), tmp_path)
    in_bucket = Stages.on(copy_run(content, tmp_path / "data", f"{s3_bucket}/z/images"), tmp_path / "bucket")
    expected = read_results(on_disk)
    assert read_results(in_bucket) == expected
    assert in_bucket.plan.pool_digest != on_disk.plan.pool_digest


def test_shards_of_a_group_have_one_order_for_all_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", 1000)
    pool = sample_images.write_pool(tmp_path / "pool", SHARDS, 2)
    orders, digests = set(), set()
    for version in range(4):
        for number, path in enumerate(sorted(pool.iterdir())):
            os.utime(path, (1 + version, 1000 * version + number))
        (group,) = shard_groups.build_shard_groups([str(pool)], str(tmp_path / str(version)), SampleFields(label=""))
        orders.add(tuple(shard.name for shard in group.shards))
        digests.add(group.digest)
    assert len(digests) == 4
    assert len(orders) == 1
