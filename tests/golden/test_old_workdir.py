"""A finished workdir of version 0.1.0 is understood: its objects parse, and its work is found and gone on with."""

import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.golden import expected, kinds, make_workdir, program
from tests.golden.bucket import FIXTURE, NAME, PREDICTIONS, Bucket, golden, path_of
from tests.golden.whole_run import WholeRun, content_of

WORK = "work/"
RESULTS = f"{WORK}golden/results.json"
# These objects are written at every run, whatever was found.
REWRITTEN = re.compile(r"work/(progress/golden/[^/]+\.json|golden/(report\.html|results\.json|receipts/[^/]+\.json))")
TRAINED = re.compile(r"work/stages/train/[0-9a-f]{16}/receipt\.json")
SCORED = re.compile(r"work/stages/score/[^/]+/parts/([0-9a-f]{16})\.parquet")


def keys(objects: dict[str, bytes] | dict[str, str], pattern: re.Pattern[str]) -> set[str]:
    """Return the keys that match a pattern."""
    return {key for key in objects if pattern.fullmatch(key)}


def run_of() -> dict[str, object]:
    """Return the parameters of the old workdir's run."""
    return program.parameters(make_workdir.RUN_FILE)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the keys of objects that were written, changed or deleted."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_the_archive_is_small() -> None:
    assert FIXTURE.stat().st_size <= 1_500_000


def test_every_path_is_the_expected_one(archived: dict[str, bytes]) -> None:
    known = golden()
    found = [key for key in archived if key.startswith(WORK)]
    predictions = [key for key in found if key.startswith(PREDICTIONS)]
    assert sorted([*(path_of(key) for key in found if key not in predictions), *known["left_out"]]) == known["paths"]
    assert set(predictions) <= set(known["possible_predictions"])


def test_a_fresh_run_writes_the_same_paths_and_schemas(
    golden_bucket: Bucket, archived: dict[str, bytes], handed_on: Path
) -> None:
    """Names depend on the configs and the data. No name depends on trained weights, which differ between processors."""
    golden_bucket.fill({key: data for key, data in archived.items() if key.startswith("data/")})
    golden_bucket.delete(f"data/pool/{make_workdir.SECOND_SHARD}")
    make_workdir.run_both_rounds(golden_bucket, handed_on)
    known = golden()
    found = golden_bucket.etags(WORK)
    predictions = [key for key in found if key.startswith(PREDICTIONS)]
    assert sorted(path_of(key) for key in found if key not in predictions) == known["paths"]
    assert set(predictions) <= set(known["possible_predictions"])
    assert len(predictions) == 6, "four models in the first round, two new ones in the second"
    fresh = {key: golden_bucket.read(key) for key in found if key.endswith(".parquet")}
    expected.check("parquet", schemas(fresh))


def test_everything_is_found_finished(
    old_workdir: Bucket, archived: dict[str, bytes], handed_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = old_workdir.etags()
    again = WholeRun(run_of(), handed_on).all()
    after = old_workdir.etags()
    assert {key for key in changed(before, after) if not REWRITTEN.fullmatch(key)} == set()
    found = [stage for stage, _ in program.FINISHED_BEFORE.findall(capsys.readouterr().out)]
    assert {stage: found.count(stage) for stage in found} == {
        "plan": 1, "train": 6, "merge": 1, "pack": 2, "evaluate": 1,
    }  # fmt: skip
    scores = [content_of(uri) for uri in again.receipts.scores]
    assert [(one["units"], one["units_found"], one["listed"]) for one in scores] == [(3, 3, 112)]
    promotion = content_of(again.receipts.promotion)
    assert (promotion["promoted"], promotion["why"]) == (False, "the student is the champion already")
    assert_same_results(archived[RESULTS], old_workdir.read(RESULTS))


def assert_same_results(before: bytes, after: bytes) -> None:
    """Compare the results of two reports of one run, except for the promotion, which is decided each time."""
    old, new = json.loads(before), json.loads(after)
    assert {**new, "promotion": None} == {**old, "promotion": None}
    keys = {key: sorted(value) if isinstance(value, dict) else "" for key, value in new.items()}
    expected.check("results", keys)


def test_another_k_is_selected_from_the_old_scores(old_workdir: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    before = old_workdir.etags()
    assert program.verb("reselect", str(make_workdir.RUN_FILE), "--images-per-class", "5") == 0
    printed = capsys.readouterr().out
    assert "15 images" in printed
    selection = re.search(rf"selection: s3://{NAME}/(\S+)", printed)
    assert selection
    table = pq.read_table(io.BytesIO(old_workdir.read(selection[1])))
    assert sorted(table["class"].to_pylist()) == [0] * 5 + [1] * 5 + [2] * 5
    assert changed(before, old_workdir.etags()) == {
        selection[1].replace("selection.parquet", name)
        for name in ("selection.parquet", "ledger.parquet", "receipt.json")
    }


def test_the_old_champion_is_replaced_and_restored(old_workdir: Bucket) -> None:
    def champion() -> tuple[str, list[str], list[str]]:
        content = json.loads(old_workdir.read(f"{WORK}champions/golden.json"))
        return content["current"]["model"], [one["model"] for one in content["former"]], content["withdrawn"]

    second, (first,), _ = champion()
    run_file = str(make_workdir.RUN_FILE)
    assert program.verb("promote", run_file) == 0, "it is the champion already"
    assert program.verb("promote", run_file, "--rollback") == 0
    assert champion() == (first, [], [second])
    assert program.verb("promote", run_file) == 1, "it was rolled back"
    assert program.verb("promote", run_file, "--force") == 0
    assert champion() == (second, [first], [])


def test_a_pool_that_grew_is_gone_on_with(old_workdir: Bucket, handed_on: Path) -> None:
    """One shard more: the teacher and the baselines are found, that shard alone is scored, the students are new."""
    before = old_workdir.etags()
    make_workdir.add_shard(old_workdir, make_workdir.THIRD_SHARD)
    third = WholeRun(run_of(), handed_on).all()
    after = old_workdir.etags()
    assert keys(before, TRAINED) < keys(after, TRAINED)
    assert len(keys(after, TRAINED) - keys(before, TRAINED)) == 3, "a pre-training and two fine-tunings"
    assert len(keys(after, SCORED) - keys(before, SCORED)) == 1
    assert {key for key in keys(before, SCORED) if before[key] != after[key]} == set()
    (scores,) = (content_of(uri) for uri in third.receipts.scores)
    assert (scores["units"], scores["units_found"], scores["listed"]) == (4, 3, 132)
    renewal = content_of(third.receipts.selection)["renewal"]
    assert renewal["changed"] > 0
    assert not renewal["kept"]
    assert content_of(third.receipts.promotion)["comparison"]["against"] == "champion"


def test_a_third_learning_rate_starts_from_the_old_pretraining(old_workdir: Bucket, handed_on: Path) -> None:
    before = old_workdir.etags()
    run = {**run_of(), "name": "third-rate", "finetune_learning_rates": [0.1, 0.2, 0.05]}
    whole = WholeRun(run, handed_on)
    whole.plan()
    whole.train_teacher()
    whole.score()
    whole.merge()
    whole.pack()
    whole.train_students()
    after = old_workdir.etags()
    assert len(keys(after, TRAINED) - keys(before, TRAINED)) == 1
    assert keys(after, SCORED) == keys(before, SCORED)
    assert content_of(whole.receipts.students[2])["source"] == content_of(whole.receipts.pretrained)["checkpoint"]


def test_a_training_is_resumed_from_an_old_checkpoint(
    old_workdir: Bucket, archived: dict[str, bytes], handed_on: Path
) -> None:
    """Without its receipt the teacher's training is unfinished; its checkpoint is of the last step."""
    whole = WholeRun(run_of(), handed_on)
    whole.plan()
    receipt = json.loads(archived[f"{WORK}golden/receipts/teacher.json"])
    folder = receipt["folder"].removeprefix(f"s3://{NAME}/")
    old_workdir.delete(f"{folder}/receipt.json")
    found = whole.train_teacher()
    assert {name: found[name] for name in ("digest", "images_processed", "curve", "checkpoint")} == {
        name: receipt[name] for name in ("digest", "images_processed", "curve", "checkpoint")
    }
    assert old_workdir.read(f"{folder}/model.safetensors") == archived[f"{folder}/model.safetensors"], (
        "no step was made"
    )


@pytest.mark.parametrize("kind", kinds.JSON_KINDS)
def test_json_objects_keep_all_their_fields(archived: dict[str, bytes], kind: str) -> None:
    found = {key: archived[key] for key in archived if key.startswith(WORK) and is_of(key, kind)}
    assert found or kind == "execution decision", "which only GPUs leave"
    for key, data in found.items():
        assert program.round_trip(kind, data) == json.loads(data), key


def is_of(key: str, kind: str) -> bool:
    """Tell whether an object of the workdir is of a kind."""
    return kinds.kind_of(key.removeprefix(WORK)) == kind


def test_fields_of_json_objects_are_unchanged() -> None:
    expected.check("documents", {kind: program.fields_of(kind) for kind in kinds.JSON_KINDS})


def test_an_execution_decision_keeps_all_its_fields() -> None:
    decision = {"layout": 1, "compiled": True, "on": "NVIDIA H100, torch 2.9"}
    assert program.round_trip("execution decision", json.dumps(decision).encode()) == decision


def test_plain_json_objects_have_their_form(archived: dict[str, bytes]) -> None:
    for key in (key for key in archived if key.startswith(WORK)):
        if is_of(key, "shards of a shard group"):
            assert all(re.fullmatch(kinds.HEX, digest) for digest in json.loads(archived[key]))
        if is_of(key, "packed tars with their labels"):
            assert all(set(tar) == {"shard", "labels"} for tar in json.loads(archived[key]))


def test_parquet_schemas_are_unchanged(archived: dict[str, bytes]) -> None:
    expected.check("parquet", schemas(archived))


def schemas(objects: dict[str, bytes]) -> dict[str, object]:
    """Return the schema of every kind of Parquet file. All files of one kind have the same."""
    found: dict[str, object] = {}
    for key in (key for key in objects if key.startswith(WORK) and key.endswith(".parquet")):
        schema, kind = kinds.parquet_schema(objects[key]), kinds.kind_of(key.removeprefix(WORK))
        assert found.setdefault(kind, schema) == schema, key
    assert set(found) == set(kinds.PARQUET_KINDS)
    return found
