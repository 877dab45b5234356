"""Test the winners of a selection, their locations, and the accounting."""

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError, TooManyBadSamplesError
from semiscale.data import reader
from semiscale.stages.plan import shard_groups
from tests.support import sample_images
from tests.support.parquet_damage import damage, truncate_rows
from tests.support.stages import Stages


def test_each_class_gets_its_best_images(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    receipt = stages.selection
    rows = pq.read_table(io.BytesIO(storage.read_bytes(receipt.selection))).to_pylist()
    assert [row["class"] for row in rows] == [0] * 12 + [1] * 12 + [2] * 12
    for start in (0, 12, 24):
        assert [row["rank"] for row in rows[start : start + 12]] == list(range(12))
        scores = [row["score"] for row in rows[start : start + 12]]
        assert scores == sorted(scores, reverse=True)
    # Image n shows class n % 4 - 1, and the teacher recognises nearly all.
    num_correct = sum(int(row["key"]) % 4 - 1 == row["class"] for row in rows)
    assert num_correct >= 34
    assert receipt.ledger.model_dump() == {"listed": 120, "scored": 120, "failed": 0, "removed": 0}
    for row in rows:
        image = reader.read_sample_bytes(row["uri"], row["offset"], row["size_bytes"])
        assert image == sample_images.draw_png(int(row["key"]) % 4 - 1, 1000 + int(row["key"]))


def test_the_receipt_counts_the_images_of_each_class(tmp_path: Path) -> None:
    receipt = Stages(tmp_path, images_per_class=60, classes_per_image=2).selection
    rows = pq.read_table(receipt.selection).to_pylist()
    classes_of: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        classes_of.setdefault((row["shard"], row["index"]), []).append(row["class"])
    assert receipt.unique_images == len(classes_of) < receipt.images == len(rows)
    for label, stats in enumerate(receipt.per_class):
        class_rows = [row for row in rows if row["class"] == label]
        assert (stats.wanted, stats.found, stats.full) == (60, len(class_rows), len(class_rows) == 60)
        assert stats.unique == sum(classes == [label] for classes in classes_of.values())
        assert stats.last_score == class_rows[-1]["score"]
    # A tenth of three shards is one shard, because it is rounded up.
    last = sorted({row["shard"] for row in rows})[-1]
    assert receipt.changed_by_last_tenth == round(sum(row["shard"] == last for row in rows) / len(rows), 4)


def test_a_class_with_fewer_images_than_k_is_short(tmp_path: Path) -> None:
    receipt = Stages(tmp_path, images_per_class=100, classes_per_image=1).selection
    assert all(stats.wanted == 100 and 0 < stats.found < 100 for stats in receipt.per_class)
    assert receipt.unique_images == receipt.images == 120


def test_an_image_in_two_classes_counts_once_as_unique(tmp_path: Path) -> None:
    receipt = Stages(tmp_path, images_per_class=100, classes_per_image=2).selection
    assert receipt.unique_images == 120
    assert receipt.images > 120


@pytest.mark.parametrize(
    ("shards", "pods_and_group_sizes"),
    [
        (12, [(1, 1000), (2, 7), (7, 100)]),
        pytest.param(256, [(1, 1000), (256, 7)], marks=pytest.mark.slow),
    ],
)
def test_the_bytes_of_the_selection_depend_neither_on_the_pods_nor_on_the_shard_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, pods_and_group_sizes: list[tuple[int, int]]
) -> None:
    pool = sample_images.write_pool(tmp_path / "many", shards, 256 // shards)
    first = Stages(tmp_path, unlabeled=[str(pool)], images_per_class=70)
    selections = set()
    for pods, images_per_group in pods_and_group_sizes:
        monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", images_per_group)
        changes = {"pods": pods, "workdir": str(tmp_path / f"{pods}-pods")}
        stages = Stages.on(first.config.model_copy(update=changes), tmp_path / f"{pods}")
        stages.teacher = first.teacher
        assert len(stages.scores) == pods
        selections.add(Path(stages.selection.selection).read_bytes())
    assert len(selections) == 1


def test_a_shard_group_without_scores_is_refused_by_name(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    folder = Path(stages.scores[0].folder)
    victim = next(folder.glob("*/receipt.json")).parent
    shutil.rmtree(victim)
    with pytest.raises(SemiscaleError, match=rf"shard group {victim.name}: .*\(pool-00.*SEMI-E305"):
        stages.merge()


def test_a_shard_that_does_not_add_up_is_refused_by_name(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    victim = next(Path(stages.scores[0].folder).glob("*/receipt.json"))
    receipt = json.loads(victim.read_text())
    receipt["shards"][0]["scored"] -= 1
    victim.write_text(json.dumps(receipt))
    name = receipt["shards"][0]["shard"]
    with pytest.raises(SemiscaleError, match=rf"shard {name}: .*SEMI-E179"):
        stages.merge()


def test_scores_of_two_teachers_are_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    other = Stages.on(stages.config, tmp_path)
    other.teacher = stages.train("teacher", learning_rate=0.5)
    mixed = [stages.scores[0], other.scores[1]]
    with pytest.raises(SemiscaleError, match=rf"{other.scores[1].folder}.*SEMI-E304"):
        stages.merge(scores=[stages.uri(receipt) for receipt in mixed])


@pytest.mark.parametrize("difference", ["teacher", "shard group"])
def test_a_receipt_of_another_teacher_or_shard_group_is_refused(tmp_path: Path, difference: str) -> None:
    stages = Stages(tmp_path)
    folder = Path(stages.scores[0].folder)
    victim, neighbour, *_ = sorted(folder.glob("*/receipt.json"))
    if difference == "teacher":
        other = Stages.on(stages.config, tmp_path)
        other.teacher = stages.train("teacher", learning_rate=0.5)
        source = Path(other.scores[0].folder) / victim.parent.name / "receipt.json"
        expected = f"{victim.parent.name} by teacher {other.teacher.digest}, not of .* by {stages.teacher.digest}"
    else:
        source, expected = neighbour, f"{neighbour.parent.name} by .*, not of {victim.parent.name} by .*"
    shutil.copy(source, victim)
    with pytest.raises(SemiscaleError, match=f"{victim}: .*{expected}.*SEMI-E303"):
        stages.merge()


def test_a_score_file_of_another_shard_group_is_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    source, victim, *_ = (path.parent for path in Path(stages.scores[0].folder).glob("*/receipt.json"))
    shutil.copy(source / "scores.parquet", victim / "scores.parquet")
    with pytest.raises(SemiscaleError, match=rf"{source.name} by teacher .* {victim.name}.*SEMI-E303"):
        stages.merge()


@pytest.mark.parametrize("rows", [0, 30, 119])
def test_a_score_file_that_lost_rows_is_refused(tmp_path: Path, rows: int) -> None:
    stages = Stages(tmp_path)
    victim = next(Path(stages.scores[0].folder).glob("*/scores.parquet"))
    num_rows = pq.read_metadata(victim).num_rows
    truncate_rows(victim, rows)
    with pytest.raises(
        SemiscaleError, match=f"{victim}: {rows} rows; expected 3 for each of {num_rows // 3} images.*SEMI-E027"
    ):
        stages.merge()


@pytest.mark.parametrize("how", ["gone", "cut off", "overwritten"])
def test_a_damaged_score_file_is_refused_by_name_and_can_be_rewritten(tmp_path: Path, how: str) -> None:
    stages = Stages(tmp_path)
    undisturbed = Path(stages.selection.selection).read_bytes()
    victim = next(Path(stages.scores[0].folder).glob("*/scores.parquet"))
    damage(victim, how)
    with pytest.raises(SemiscaleError, match=f"^{victim}: .*{victim.parent} .*SEMI-E027"):
        stages.merge(images_per_class=13)
    shutil.rmtree(victim.parent)
    stages.score(0)
    assert Path(stages.merge(workdir=str(tmp_path / "again")).selection).read_bytes() == undisturbed


def test_the_accounting_has_a_row_for_each_shard(tmp_path: Path) -> None:
    members = {f"{n}.png": b"text" if n % 3 else sample_images.draw_png(0, n) for n in range(7)}
    sample_images.write_tar(tmp_path / "data" / "pool" / "bad.tar", members)
    receipt = Stages(tmp_path, max_failed_fraction=1).selection
    complete = {"listed": 40, "scored": 40, "failed": 0, "removed": 0}
    assert pq.read_table(receipt.shards).to_pylist() == [
        {"shard": "bad.tar", "listed": 7, "scored": 3, "failed": 4, "removed": 0},
        *({"shard": f"pool-{shard:03}.tar", **complete} for shard in range(3)),
    ]
    assert receipt.ledger.model_dump() == {"listed": 127, "scored": 123, "failed": 4, "removed": 0}


def test_a_pool_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    pool = sample_images.write_tar(tmp_path / "bad.tar", {f"{n}.png": b"text" for n in range(5)})
    stages = Stages(tmp_path, unlabeled=[str(pool)], max_failed_fraction=1)
    with pytest.raises(SemiscaleError, match=r"SEMI-E301"):
        stages.merge()


def test_too_many_failures_in_the_pool_are_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    sample_images.write_tar(tmp_path / "data" / "pool" / "bad.tar", {f"{n}.png": b"text" for n in range(5)})
    with pytest.raises(TooManyBadSamplesError, match=r"unlabeled: 5 of 125 .*bad.tar 0.*not an image.*SEMI-E307"):
        stages.merge()


def test_a_refused_run_continues_under_its_name_after_the_fraction_is_raised(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    sample_images.write_tar(tmp_path / "data" / "pool" / "bad.tar", {f"{n}.png": b"text" for n in range(5)})
    with pytest.raises(TooManyBadSamplesError, match=r"SEMI-E307"):
        stages.merge()
    score_files = sorted(Path(stages.scores[0].folder).glob("*/scores.parquet"))
    before = [path.stat().st_mtime_ns for path in score_files]
    again = Stages.on(stages.config.model_copy(update={"max_failed_fraction": 0.5}), tmp_path)
    assert again.plan.name == stages.plan.name
    assert again.teacher == stages.teacher
    assert again.unscored.pods == 1
    assert all(receipt.units_found == receipt.units > 0 for receipt in again.scores)
    assert [path.stat().st_mtime_ns for path in score_files] == before
    assert again.selection.ledger.failed == 5
