"""Test scheduled retraining: three rounds over a growing pool, and the champion."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from semiscale import storage
from semiscale.cli.main import main
from semiscale.common.errors import InvalidInputError
from semiscale.evaluation import metrics
from semiscale.receipts.merge import PoolAccounting, SelectionReceipt
from semiscale.stages.merge.retrain_gate import fraction_changed, keep_or_replace
from semiscale.stages.plan.stage import plan
from semiscale.stages.promote.champion import (
    Champion,
    ChampionRecord,
    champion_uri,
    promote_record,
    rollback_record,
    update_champion,
)
from semiscale.stages.promote.stage import SIGNIFICANCE_LEVEL, PromoteConfig, decide
from semiscale.storage.documents import load_document
from tests.support import sample_images
from tests.support.stages import Stages

NO_PIPELINE: Any = None
# Folder, shards, images of a shard, and seed.
GROWTH = (("first", 3, 40, 1000), ("second", 1, 4, 5000), ("third", 3, 40, 9000))


class Rounds:
    """Three rounds of a run. The pool grows after each round."""

    def __init__(self, root: Path, bucket: str = "") -> None:
        self.root = root
        uris = {"workdir": f"{bucket}/work", "unlabeled": [f"{bucket}/pool"]} if bucket else {}
        rates = {"baseline_learning_rates": [1.0], "finetune_learning_rates": [0.1]}
        first = Stages(root, retrain_above=0.25, pods=5, **rates, **uris)
        pool = root / "data" / "pool"
        shutil.rmtree(pool)
        self.stages = []
        for name, shards, images, seed in GROWTH:
            sample_images.write_pool(pool / name, shards, images, seed)
            for path in (pool / name).iterdir() if bucket else []:
                storage.upload(path, f"{bucket}/pool/{name}/{path.name}")
            stages = Stages.on(first.config, root)
            assert stages.report
            self.stages.append(stages)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    return Rounds(tmp_path_factory.mktemp("rounds"))


def test_three_rounds_over_a_bucket_that_grows(tmp_path: Path, gs_bucket: str) -> None:
    """The pool, the workdir and the champion of the rounds are in an object store."""
    first, second, third = Rounds(tmp_path, gs_bucket).stages
    assert [stages.selection.ledger.listed for stages in (first, second, third)] == [120, 124, 244]
    before = json.loads(storage.read_bytes(second.plan.units))
    assert sum(pod.units_found for pod in third.scores) == len(before), "only new shards were scored"
    assert (second.students, second.pretrained) == (first.students, first.pretrained), "it changed little"
    assert third.students[0].digest != first.students[0].digest
    assert third.promotion.comparison
    assert third.promotion.comparison.against == "champion"
    champion = load_document(champion_uri(f"{gs_bucket}/work", "trial"), Champion)
    assert champion.current.model == (third if third.promotion.promoted else first).promotion.model


def test_a_round_scores_only_new_shards(rounds: Rounds) -> None:
    before: set[str] = set()
    for stages in rounds.stages:
        groups = {group["digest"] for group in json.loads(Path(stages.plan.units).read_text())}
        assert sum(pod.units - pod.units_found for pod in stages.scores) == len(groups - before)
        assert before < groups, "a scored shard group stays"
        before = groups
    assert [stages.selection.ledger.listed for stages in rounds.stages] == [120, 124, 244]
    assert len({stages.teacher.digest for stages in rounds.stages}) == 1


def test_a_round_has_as_many_scoring_pods_as_there_are_new_shards(rounds: Rounds) -> None:
    assert [stages.plan.pods for stages in rounds.stages] == [3, 4, 5]
    assert [len(stages.scores) for stages in rounds.stages] == [3, 1, 3]
    assert rounds.stages[1].unscored.why == "1 of 4 pods: 1 of 4 shards to score, 1 of 2 shard groups to rank"
    again = Stages.on(rounds.stages[-1].config, rounds.root)
    again.__dict__["teacher"] = again.teacher.model_copy(update={"digest": "another"})
    assert again.unscored.why == "5 of 5 pods: 7 of 7 shards to score, 3 of 3 shard groups to rank"


def test_a_round_without_new_images_runs_one_pod_per_loop_and_changes_nothing(rounds: Rounds) -> None:
    third = rounds.stages[-1]
    before = json.loads(Path(third.report.results).read_text())
    quiet = Stages.on(third.config, rounds.root)
    assert quiet.unscored.why == "1 of 5 pods: 0 of 7 shards to score, 0 of 3 shard groups to rank"
    assert quiet.unpacked.why == "1 of 5 pods: 0 of 1 tars to pack"
    (alone,) = quiet.scores
    assert (alone.listed, alone.units, alone.units_found) == (244, 3, 3), "it counts for all earlier pods"
    assert (quiet.selection.selection, quiet.packed) == (third.selection.selection, third.packed)
    assert (quiet.students, quiet.evaluation) == (third.students, third.evaluation)
    after = json.loads(Path(quiet.report.results).read_text())
    assert {**after, "promotion": None} == {**before, "promotion": None}


def test_one_pod_over_the_whole_pool_writes_the_bytes_of_three_rounds(rounds: Rounds, tmp_path: Path) -> None:
    third = rounds.stages[-1]
    alone = Stages.on(third.config.model_copy(update={"workdir": str(tmp_path / "work"), "pods": 1}), tmp_path)
    alone.__dict__["teacher"] = third.teacher
    assert len(alone.scores) == 1
    assert Path(alone.selection.selection).read_bytes() == Path(third.selection.selection).read_bytes()
    tars = [sorted(Path(stages.packed.folder).glob("*.tar")) for stages in (alone, third)]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]] != []


def test_a_round_that_changes_little_trains_nothing(rounds: Rounds) -> None:
    first, second, _ = rounds.stages
    assert first.selection.renewal is None
    assert second.selection.renewal
    assert second.selection.renewal.kept
    assert second.selection.renewal.changed <= 0.25
    assert second.selection.selection == first.selection.selection
    assert second.pretrained == first.pretrained
    assert second.students == first.students
    assert second.evaluation == first.evaluation
    assert second.promotion.why == "the student is the champion already"


def test_a_round_that_changes_much_trains_again(rounds: Rounds) -> None:
    first, _, third = rounds.stages
    assert third.selection.renewal
    assert not third.selection.renewal.kept
    assert third.selection.renewal.changed > 0.25
    assert third.students[0].digest != first.students[0].digest
    assert third.baselines == first.baselines


def test_a_new_label_changes_the_digest_of_the_plan(rounds: Rounds) -> None:
    stages = rounds.stages[-1]
    path = Path(str(stages.content["labeled"][0])) / "red" / "new.png"
    path.write_bytes(sample_images.draw_png(0, 77))
    try:
        assert plan(stages.config).digest != stages.plan.digest
    finally:
        path.unlink()


def test_the_first_opponent_is_the_baseline_then_the_champion(rounds: Rounds) -> None:
    first, _, third = rounds.stages
    for stages, against in ((first, "baseline"), (third, "champion")):
        assert stages.promotion.comparison
        assert stages.promotion.comparison.against == against
        assert stages.promotion.promoted == (stages.promotion.comparison.p_worse > SIGNIFICANCE_LEVEL)
    champion = load_document(champion_uri(third.workdir, "trial"), Champion)
    records = [champion.current, *champion.former]
    assert [record.model for record in reversed(records)] == [
        stages.promotion.model for stages in (first, third) if stages.promotion.promoted
    ]


def test_the_verb_promotes_and_rolls_back(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, third = rounds.stages
    path = rounds.root / "run.yaml"
    path.write_text(yaml.safe_dump(first.content))
    uri = champion_uri(third.workdir, "trial")
    mine, before = third.promotion.model, first.promotion.model

    def promote(*options: str) -> int:
        return main(NO_PIPELINE, ["promote", str(path), *options])

    def read_champion() -> tuple[str, list[str], list[str]]:
        champion = load_document(uri, Champion)
        return champion.current.model, [record.model for record in champion.former], champion.withdrawn

    assert promote("--force") == 0
    assert read_champion() == (mine, [before], [])
    assert promote() == 0, "it is the champion already"
    assert promote("--rollback") == 0
    assert read_champion() == (before, [], [mine])
    assert f"champion: {before} of run 'trial' again" in capsys.readouterr().out
    assert promote() == 1
    assert "[SEMI-E431]" in capsys.readouterr().err
    assert promote("--rollback") == 2
    assert "SEMI-E342" in capsys.readouterr().err
    assert promote("--force") == 0
    assert read_champion() == (mine, [before], [])


def test_a_champion_of_another_test_set_is_evaluated_on_this_set(rounds: Rounds) -> None:
    stages = rounds.stages[-1]
    baseline = stages.baselines[0]
    shutil.rmtree(Path(stages.workdir) / "stages" / "evaluate" / "predictions")
    other = build_record(baseline.digest, training=storage.join(baseline.folder, "receipt.json"), test="another")
    update_champion(champion_uri(stages.workdir, "other"), lambda champion: promote_record(champion, other))
    receipt = stages.promote(champion="other", promotion="never")
    expected = next(comparison for comparison in stages.evaluation.comparisons if comparison.against == "baseline")
    assert receipt.comparison == expected.model_copy(update={"against": "champion"})
    assert not receipt.promoted
    assert receipt.why.startswith("promotion is never; against the champion: ")


def build_record(model: str, **changes: Any) -> ChampionRecord:
    """Return the record of a champion."""
    defaults = {"checkpoint": "", "training": "", "run": "trial", "test": "t", "top1": 0.5, "since": "", "why": ""}
    return ChampionRecord.model_validate({"model": model, **defaults, **changes})


@pytest.mark.parametrize(
    ("wins", "losses", "promoted"), [(9, 9, True), (0, 4, True), (0, 5, False), (30, 40, True), (30, 47, False)]
)
def test_a_model_is_worse_by_a_paired_one_sided_test(rounds: Rounds, wins: int, losses: int, promoted: bool) -> None:
    model_B = np.array([True] * wins + [False] * losses + [True] * 100)
    other_B = np.array([False] * wins + [True] * losses + [True] * 100)
    comparison = metrics.compare_paired("student", model_B, "champion", other_B)
    config = PromoteConfig(workdir="w", plan="p", evaluation="e")
    champion = promote_record(None, build_record("former"))
    assert decide(config, champion, rounds.stages[0].students[0], comparison)[0] is promoted
    forced = config.model_copy(update={"force": True})
    assert decide(forced, champion, rounds.stages[0].students[0], comparison) == (True, "by force")
    assert not decide(config, champion, rounds.stages[0].students[0], None)[0], "of other classes"


def test_the_champion_is_switched_in_every_store(bucket: str) -> None:
    uri = champion_uri(bucket, "birds")
    assert update_champion(uri, lambda _: None) is None
    assert storage.head(uri) is None
    with pytest.raises(InvalidInputError, match="SEMI-E341"):
        update_champion(uri, lambda champion: rollback_record(uri, champion))
    for number in range(3):
        update_champion(uri, lambda champion, number=number: promote_record(champion, build_record(f"m{number}")))  # type: ignore[misc]
    assert update_champion(uri, lambda _: None) == load_document(uri, Champion)
    update_champion(uri, lambda champion: rollback_record(uri, champion))
    assert load_document(uri, Champion) == Champion(
        current=build_record("m1"), former=[build_record("m0")], withdrawn=["m2"]
    )


def test_an_update_reads_the_concurrent_write_of_another_process(bucket: str) -> None:
    uri = champion_uri(bucket, "birds")
    models_read: list[str | None] = []

    def change(champion: Champion | None) -> Champion:
        models_read.append(champion.current.model if champion else None)
        # Another process writes first, once.
        if len(models_read) == 1:
            storage.write_bytes(uri, promote_record(champion, build_record("theirs")).model_dump_json().encode())
        return promote_record(champion, build_record("mine"))

    updated = update_champion(uri, change)
    assert models_read == [None, "theirs"]
    assert updated
    assert (updated.current.model, [record.model for record in updated.former]) == ("mine", ["theirs"])


def test_an_object_that_is_no_champion_is_refused(tmp_path: Path) -> None:
    uri = champion_uri(str(tmp_path), "birds")
    storage.write_bytes(uri, json.dumps({"current": "me"}).encode())
    with pytest.raises(InvalidInputError, match="SEMI-E343"):
        update_champion(uri, lambda champion: champion)


def write_selection(folder: Path, images: range) -> SelectionReceipt:
    """Write a selection of three classes with a row for each image.

    Returns:
        The receipt of the selection.
    """
    rows = {
        "class": pa.array([image % 3 for image in images], pa.uint16()),
        "shard": [f"shard-{image // 10}" for image in images],
        "index": pa.array([image % 10 for image in images], pa.int64()),
    }
    uri = folder / f"{images.start}-{images.stop}.parquet"
    pq.write_table(pa.table(rows), uri, row_group_size=7)
    return SelectionReceipt.model_validate(
        {
            "stage": "merge", "digest": uri.stem, "folder": str(folder), "seconds": 1, "selection": str(uri),
            "teacher": "t", "images": len(images), "unique_images": len(images), "images_per_class": 40,
            "classes_per_image": 1, "per_class": [], "failed": {}, "bytes_read": 1, "changed_by_last_tenth": 0.1,
            "ledger": PoolAccounting(listed=images.stop, scored=images.stop, failed=0, removed=0),
        }
    )  # fmt: skip


def test_small_changes_add_up(tmp_path: Path) -> None:
    nights = [write_selection(tmp_path, range(start, start + 100)) for start in (0, 8, 16, 20)]
    receipts = [keep_or_replace(night, str(tmp_path), "family", retrain_above=0.1) for night in nights]
    assert [receipt.digest for receipt in receipts] == ["0-100", "0-100", "16-116", "16-116"]
    assert [receipt.renewal and receipt.renewal.changed for receipt in receipts] == [None, 0.08, 0.16, 0.04]
    assert [receipt.ledger.listed for receipt in receipts] == [100, 108, 116, 120], "the counts are always tonight's"
    assert keep_or_replace(nights[0], str(tmp_path), "another", 0.1).digest == "0-100"


def test_a_night_without_changes_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night = write_selection(tmp_path, range(100))
    keep_or_replace(night, str(tmp_path), "f", 0.1)
    assert capsys.readouterr().out == ""
    assert keep_or_replace(night, str(tmp_path), "f", 0.1) == night
    assert "nothing new to train on" in capsys.readouterr().out


def test_the_threshold_0_retrains_after_any_change_and_not_without_one(tmp_path: Path) -> None:
    same = write_selection(tmp_path, range(50)).model_copy(update={"digest": "of a larger pool"})
    selections = (write_selection(tmp_path, range(50)), same)
    receipts = [keep_or_replace(selection, str(tmp_path), "f", 0.0) for selection in selections]
    assert [receipt.digest for receipt in receipts] == ["0-50", "0-50"]
    assert keep_or_replace(write_selection(tmp_path, range(51)), str(tmp_path), "f", 0.0).digest == "0-51"


def test_a_deleted_selection_is_replaced(tmp_path: Path) -> None:
    first, second = write_selection(tmp_path, range(100)), write_selection(tmp_path, range(1, 101))
    keep_or_replace(first, str(tmp_path), "f", 0.5)
    Path(first.selection).unlink()
    assert keep_or_replace(second, str(tmp_path), "f", 0.5) == second


def test_the_change_counts_added_and_removed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(earlier: range, fresh: range) -> float:
        return fraction_changed(
            write_selection(tmp_path, earlier).selection, write_selection(tmp_path, fresh).selection
        )

    monkeypatch.setattr("semiscale.stages.merge.retrain_gate.ROWS_PER_BATCH", 16)
    assert compare(range(100), range(100)) == 0
    assert compare(range(100), range(50)) == pytest.approx(0.5)
    assert compare(range(100), range(200)) == pytest.approx(0.5)
    assert compare(range(100), range(90, 190)) == pytest.approx(0.9)
    assert compare(range(100), range(100, 200)) == 1


def test_an_image_in_another_class_is_another_row(tmp_path: Path) -> None:
    earlier = write_selection(tmp_path, range(30)).selection
    table = pq.read_table(earlier)
    label = pa.array([(value + 1) % 3 for value in table["class"].to_pylist()], pa.uint16())
    pq.write_table(table.set_column(0, "class", label), tmp_path / "moved.parquet")
    assert fraction_changed(earlier, str(tmp_path / "moved.parquet")) == 1
