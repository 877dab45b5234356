"""Make the finished workdir that the golden tests start from.

The archive was made at revision f0b0de0, the last one before the restructuring, with

    python -m tests.golden.make_workdir

Do not make it again with a later version, because it represents the workdirs of users. A later version gets its own
archive. It takes half a minute.

All objects are in the bucket s3://semiscale-golden of an S3 server, because the versions of S3 objects are digests of
their bytes. On a disk the versions are times, so each unpacked workdir would have other digests of shards. The run has
two rounds, as in scheduled retraining. The pool grows by one shard in between. Then the champion has a predecessor.

`data/later/` holds one more shard. It is new to both rounds.

The archive does not have tensors that no test reads. Each network has 310 kB of them, and they do not compress.
"""

import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden import program
from tests.golden.bucket import FIXTURE, GOLDEN, HERE, NAME, PREDICTIONS, Bucket, pack_objects, path_of
from tests.golden.whole_run import WholeRun, content_of
from tests.support import sample_images
from tests.support.servers import serve_store

REVISION = "f0b0de0"
RUN_FILE = HERE / "run.yaml"
SECOND_SHARD, THIRD_SHARD = "pool-003.tar", "pool-004.tar"
# This image of the first shard is damaged.
BROKEN = "00007.png"
REMOVED = ("00002", "no-such-key")


def make_data() -> dict[str, bytes]:
    """Draw the data of both rounds.

    It has labeled sets of three classes, five tars and a Parquet file of twenty images each, and twelve loose files.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sample_images.write_folders(root / "labeled", 4)
        sample_images.write_parquet(root / "validation.parquet", 4, seed=100)
        sample_images.write_labeled_tar(root / "test" / "test.tar", 6, seed=200)
        sample_images.write_pool(root / "pool", 5, 20)
        members = {f"{number:05}.png": sample_images.draw_png(number % 4 - 1, 1000 + number) for number in range(20)}
        members[BROKEN] = members[BROKEN][:60]
        sample_images.write_tar(root / "pool" / "pool-000.tar", members)
        data = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    images = [sample_images.draw_png(number % 4 - 1, 3000 + number) for number in range(20)]
    table = io.BytesIO()
    pq.write_table(pa.table({"image": images, "key": [f"row-{number:03}" for number in range(20)]}), table)
    data["pool/pool.parquet"] = table.getvalue()
    for number in range(12):
        data[f"loose/{number // 6}/{number:03}.png"] = sample_images.draw_png(number % 4 - 1, 4000 + number)
    data["classes.txt"] = "\n".join(sample_images.CLASSES).encode()
    data["remove.txt"] = "\n".join(REMOVED).encode()
    for name in (SECOND_SHARD, THIRD_SHARD):
        data[f"later/{name}"] = data.pop(f"pool/{name}")
    return {f"data/{name}": content for name, content in data.items()}


def add_shard(bucket: Bucket, name: str) -> None:
    """Add a shard to the pool."""
    bucket.write(f"data/pool/{name}", bucket.read(f"data/later/{name}"))


def run_both_rounds(bucket: Bucket, folder: Path) -> list[WholeRun]:
    """Run the two rounds on the data in the bucket."""
    run = program.parameters(RUN_FILE)
    first = WholeRun(run, folder / "first").all()
    add_shard(bucket, SECOND_SHARD)
    return [first, WholeRun(run, folder / "second").all()]


def archived_trainings(rounds: list[WholeRun]) -> set[str]:
    """Return the digests of the trainings whose tensors a test reads.

    They are the teacher, the last pre-training and the champion.
    """
    last = rounds[-1].receipts
    best = content_of(last.evaluation)["models"]["student"]["receipt"]
    return {content_of(last.teacher)["digest"], content_of(last.pretrained)["digest"], best}


def is_left_out(key: str, archived: set[str], teacher: str) -> bool:
    """Return whether an object is not in the archive.

    The archive has the training checkpoint of the teacher only.
    """
    training = re.match(r"work/stages/train/([0-9a-f]{16})/(.+)\.safetensors$", key)
    if not training:
        return False
    return training[1] != teacher if training[2].startswith("checkpoints/") else training[1] not in archived


def possible_predictions(rounds: list[WholeRun]) -> list[str]:
    """Return the keys of the possible predictions of all trained models.

    The evaluation writes them only for chosen models.
    """
    keys = set[str]()
    for whole in rounds:
        receipts, test = whole.receipts, content_of(whole.receipts.plan)["test"]["digest"]
        trainings = [receipts.teacher, receipts.pretrained, *receipts.students, *receipts.baselines]
        keys.update(
            f"{PREDICTIONS}{program.digest_of(content_of(uri)['digest'], test, whole.run['image_column'])}.parquet"
            for uri in trainings
        )
    return sorted(keys)


def main() -> None:
    """Make the archive and its list."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with serve_store("s3") as address, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        settings = {"AWS_ENDPOINT_URL": address, "NO_PROXY": "127.0.0.1", **credentials}
        with mock.patch.dict(os.environ, settings):
            program.make_small_shard_groups(patch)
            bucket = Bucket()
            bucket.empty()
            bucket.fill(make_data())
            rounds = run_both_rounds(bucket, Path(folder))
            if not content_of(rounds[-1].receipts.promotion)["promoted"]:
                sys.exit("the second round's student was not promoted: the champion would have no predecessor")
            write_fixture(bucket, rounds)


def write_fixture(bucket: Bucket, rounds: list[WholeRun]) -> None:
    """Write the archive, and the list of its objects."""
    archived, teacher = archived_trainings(rounds), content_of(rounds[-1].receipts.teacher)["digest"]
    objects = {key: bucket.read(key) for key in bucket.etags()}
    left_out = sorted(key for key in objects if is_left_out(key, archived, teacher))
    predictions = possible_predictions(rounds)
    work = [path_of(key) for key in objects if key.startswith("work/") and not key.startswith(PREDICTIONS)]
    assert {key for key in objects if key.startswith(PREDICTIONS)} <= set(predictions)
    content = {
        "bucket": NAME,
        "revision": REVISION,
        "left_out": [path_of(key) for key in left_out],
        "paths": sorted(work),
        "possible_predictions": predictions,
    }
    FIXTURE.write_bytes(pack_objects({key: data for key, data in objects.items() if key not in left_out}))
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(objects)} objects, {len(left_out)} left out; {FIXTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
