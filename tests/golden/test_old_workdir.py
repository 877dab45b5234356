"""Test that the program reuses a finished workdir of version 0.1.0."""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.golden import expected, kinds, make_workdir, program
from tests.golden.bucket import FIXTURE, NAME, PREDICTIONS, Bucket, golden, path_of
from tests.golden.whole_run import WholeRun, content_of

WORK = "work/"
RESULTS = f"{WORK}golden/results.json"
# Every run writes these objects, even if all its work was finished before.
REWRITTEN = re.compile(r"work/(progress/golden/[^/]+\.json|golden/(report\.html|results\.json|receipts/[^/]+\.json))")
TRAINED = re.compile(r"work/stages/train/[0-9a-f]{16}/receipt\.json")
SCORED = re.compile(r"work/stages/score/[^/]+/parts/[0-9a-f]{16}\.parquet")
# The archive does not have these kinds. GPUs write a decision, and the verb `measure` writes a measurement.
WRITTEN_BY_OTHERS = ("execution decision", "measurement")
RUN = program.parameters(make_workdir.RUN_FILE)


def matching(keys: Iterable[str], pattern: re.Pattern[str]) -> set[str]:
    """Return the keys that match a pattern."""
    return {key for key in keys if pattern.fullmatch(key)}


def changed_keys(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the keys of objects that were written, changed or deleted."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def paths_and_predictions(keys: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return the paths of a workdir without random parts, and the keys of predictions."""
    work = [key for key in keys if key.startswith(WORK)]
    predictions = {key for key in work if key.startswith(PREDICTIONS)}
    return sorted(path_of(key) for key in work if key not in predictions), predictions


def put_first_pool(bucket: Bucket, archived: dict[str, bytes]) -> None:
    """Put the data of the first round into the bucket, without a workdir."""
    bucket.fill({key: data for key, data in archived.items() if key.startswith("data/")})
    bucket.delete(f"data/pool/{make_workdir.SECOND_SHARD}")


def schemas(objects: dict[str, bytes]) -> dict[str, object]:
    """Return the schema of every kind of Parquet file, after checking each file."""
    by_kind: dict[str, object] = {}
    for key in (key for key in objects if key.startswith(WORK) and key.endswith(".parquet")):
        schema, kind = kinds.parquet_schema(objects[key]), kinds.kind_of(key.removeprefix(WORK))
        assert by_kind.setdefault(kind, schema) == schema, key
    assert set(by_kind) == set(kinds.PARQUET_KINDS)
    return by_kind


def test_the_archive_is_small() -> None:
    assert FIXTURE.stat().st_size <= 1_500_000


def test_every_path_is_the_expected_one(archived: dict[str, bytes]) -> None:
    content = golden()
    paths, predictions = paths_and_predictions(archived)
    assert sorted([*paths, *content["left_out"]]) == content["paths"]
    assert predictions <= set(content["possible_predictions"])


def test_a_fresh_run_writes_the_same_paths_and_schemas(
    golden_bucket: Bucket, archived: dict[str, bytes], handed_on: Path
) -> None:
    """Names depend on configs and data.

    No name depends on trained weights, which differ between processors.
    """
    put_first_pool(golden_bucket, archived)
    WholeRun(RUN, handed_on).all()
    keys = golden_bucket.etags(WORK)
    paths, predictions = paths_and_predictions(keys)
    expected.check_equal("paths_of_first_round", paths)
    assert predictions <= set(golden()["possible_predictions"])
    assert len(predictions) == 4
    assert all(kinds.kind_of(key.removeprefix(WORK)) for key in keys)
    fresh = {key: golden_bucket.read(key) for key in keys if key.endswith(".parquet")}
    expected.check_equal("parquet", schemas(fresh))


@pytest.mark.slow
def test_two_fresh_rounds_write_the_same_paths_whatever_the_weights_are(
    golden_bucket: Bucket, archived: dict[str, bytes], handed_on: Path
) -> None:
    """The test changes the teacher's tensors after its training.

    Another processor would have trained other tensors.
    """
    put_first_pool(golden_bucket, archived)
    first = WholeRun(RUN, handed_on / "teacher")
    first.plan()
    folder = first.train_teacher()["folder"].removeprefix(f"s3://{NAME}/")
    tensors = golden_bucket.read(f"{folder}/model.safetensors")
    # The second lowest byte of the last 50,000 numbers changes, which is about one per cent of each number.
    noisy = tensors[:-200_000] + bytes(
        byte ^ 0x7F if index % 4 == 1 else byte for index, byte in enumerate(tensors[-200_000:])
    )
    golden_bucket.write(f"{folder}/model.safetensors", noisy)
    make_workdir.run_both_rounds(golden_bucket, handed_on)
    paths, predictions = paths_and_predictions(golden_bucket.etags())
    selections = [key for key in archived if re.fullmatch(r"work/stages/merge/[^/]+/selection\.parquet", key)]
    assert all(golden_bucket.read(key) != archived[key] for key in selections), "the scores are others"
    assert paths == golden()["paths"]
    assert predictions <= set(golden()["possible_predictions"])


def test_finished_work_is_reused(
    old_workdir: Bucket, archived: dict[str, bytes], handed_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = old_workdir.etags()
    again = WholeRun(RUN, handed_on).all()
    changed = changed_keys(before, old_workdir.etags())
    assert changed - matching(changed, REWRITTEN) == set()
    stages = [stage for stage, _ in program.FINISHED_BEFORE.findall(capsys.readouterr().out)]
    assert {stage: stages.count(stage) for stage in stages} == {
        "plan": 1, "train": 6, "merge": 1, "pack": 2, "evaluate": 1,
    }  # fmt: skip
    (scores,) = (content_of(uri) for uri in again.receipts.scores)
    assert (scores["units"], scores["units_found"], scores["listed"]) == (3, 3, 112)
    promotion = content_of(again.receipts.promotion)
    assert (promotion["promoted"], promotion["comparison"]) == (False, None), "the student is the champion already"
    old, new = json.loads(archived[RESULTS]), json.loads(old_workdir.read(RESULTS))
    assert expected.missing_values({**old, "promotion": None}, {**new, "promotion": None}) == []


def test_another_k_is_selected_from_the_old_scores(old_workdir: Bucket) -> None:
    before = old_workdir.etags()
    assert program.verb("reselect", str(make_workdir.RUN_FILE), "--images-per-class", "5") == 0
    changed = changed_keys(before, old_workdir.etags())
    (selection,) = (key for key in changed if key.endswith("/selection.parquet"))
    folder = selection.rpartition("/")[0]
    assert changed == {f"{folder}/{name}" for name in ("selection.parquet", "ledger.parquet", "receipt.json")}
    table = pq.read_table(io.BytesIO(old_workdir.read(selection)))
    assert sorted(table["class"].to_pylist()) == [0] * 5 + [1] * 5 + [2] * 5


def test_another_k_is_selected_from_a_run_without_a_report(old_workdir: Bucket) -> None:
    """The receipts of an unfinished run are only below `stages`."""
    for key in old_workdir.etags(f"{WORK}golden/receipts/"):
        old_workdir.delete(key)
    before = old_workdir.etags()
    assert program.verb("reselect", str(make_workdir.RUN_FILE), "--images-per-class", "5") == 0
    changed = changed_keys(before, old_workdir.etags())
    assert sorted(key.rpartition("/")[2] for key in changed) == [
        "ledger.parquet", "pods.json", "receipt.json", "selection.parquet",
    ]  # fmt: skip
    (pods,) = (key for key in changed if key.endswith("/pods.json"))
    data = old_workdir.read(pods)
    assert expected.missing_values(json.loads(data), program.round_trip("pod's score receipt", data)) == []


def test_an_old_student_is_measured(old_workdir: Bucket) -> None:
    """The measurement reuses the predictions of the old run."""
    before = old_workdir.etags()
    run_file = str(make_workdir.RUN_FILE)
    assert program.verb("measure", run_file, run_file, "--model", "student") == 0
    after = old_workdir.etags()
    (key,) = (key for key in after.keys() - before.keys() if kinds.kind_of(key.removeprefix(WORK)) == "measurement")
    data = old_workdir.read(key)
    assert expected.missing_values(json.loads(data), program.round_trip("measurement", data)) == []
    assert len(paths_and_predictions(after)[1]) == len(paths_and_predictions(before)[1])


def test_the_old_champion_is_withdrawn_and_promoted_again(old_workdir: Bucket) -> None:
    def champion() -> tuple[str, list[str], list[str]]:
        content = json.loads(old_workdir.read(f"{WORK}champions/golden.json"))
        return content["current"]["model"], [former["model"] for former in content["former"]], content["withdrawn"]

    second, (first,), withdrawn = champion()
    run_file = str(make_workdir.RUN_FILE)
    assert withdrawn == []
    assert program.verb("promote", run_file) == 0, "it is the champion already"
    assert program.verb("promote", run_file, "--rollback") == 0
    assert champion() == (first, [], [second])
    assert program.verb("promote", run_file) == 1, "it was withdrawn"
    assert program.verb("promote", run_file, "--force") == 0
    assert champion() == (second, [first], [])


def test_a_run_continues_after_its_pool_has_grown(old_workdir: Bucket, handed_on: Path) -> None:
    """With one more shard, only that shard is scored.

    The teacher and the baselines are reused. The students are new.
    """
    before = old_workdir.etags()
    make_workdir.add_shard(old_workdir, make_workdir.THIRD_SHARD)
    third = WholeRun(RUN, handed_on).all()
    after = old_workdir.etags()
    changed = changed_keys(before, after)
    assert len(matching(changed, TRAINED)) == 3, "one pre-training and two fine-tunings"
    assert len(matching(changed, SCORED)) == 1
    assert matching(changed, TRAINED) | matching(changed, SCORED) <= after.keys() - before.keys()
    (scores,) = (content_of(uri) for uri in third.receipts.scores)
    assert (scores["units"], scores["units_found"], scores["listed"]) == (4, 3, 132)
    renewal = content_of(third.receipts.selection)["renewal"]
    assert renewal["changed"] > 0
    assert not renewal["kept"]
    assert content_of(third.receipts.promotion)["comparison"]["against"] == "champion"
    paths, predictions = paths_and_predictions(after.keys() - before.keys())
    expected.check_equal("paths_of_third_round", paths)
    assert len(predictions) == 2, "of the students before and after fine-tuning"


def test_a_third_learning_rate_starts_from_the_old_pretraining(old_workdir: Bucket, handed_on: Path) -> None:
    before = old_workdir.etags()
    whole = WholeRun({**RUN, "name": "third-rate", "finetune_learning_rates": [0.1, 0.2, 0.05]}, handed_on)
    for stage in (whole.plan, whole.train_teacher, whole.score, whole.merge, whole.pack, whole.train_students):
        stage()
    changed = changed_keys(before, old_workdir.etags())
    assert len(matching(changed, TRAINED)) == 1
    assert matching(changed, SCORED) == set()
    assert content_of(whole.receipts.students[2])["source"] == content_of(whole.receipts.pretrained)["checkpoint"]


def test_a_training_resumes_from_an_old_checkpoint(
    old_workdir: Bucket, archived: dict[str, bytes], handed_on: Path
) -> None:
    """The teacher's training is unfinished, because it has no receipt.

    Its checkpoint is that of the last step.
    """
    old = json.loads(archived[f"{WORK}golden/receipts/teacher.json"])
    folder = old["folder"].removeprefix(f"s3://{NAME}/")
    old_workdir.delete(f"{folder}/receipt.json")
    whole = WholeRun(RUN, handed_on)
    whole.plan()
    new = whole.train_teacher()
    fields = ("digest", "images_processed", "curve", "checkpoint")
    assert {field: new[field] for field in fields} == {field: old[field] for field in fields}
    assert old_workdir.read(f"{folder}/model.safetensors") == archived[f"{folder}/model.safetensors"], "no new step"


@pytest.mark.parametrize("kind", kinds.JSON_KINDS)
def test_json_objects_keep_all_their_fields(archived: dict[str, bytes], kind: str) -> None:
    objects = {key: data for key, data in archived.items() if key.startswith(WORK) and is_of(key, kind)}
    assert objects or kind in WRITTEN_BY_OTHERS
    for key, data in objects.items():
        assert expected.missing_values(json.loads(data), program.round_trip(kind, data)) == [], key


def is_of(key: str, kind: str) -> bool:
    """Return whether an object of the workdir is of a kind."""
    return kinds.kind_of(key.removeprefix(WORK)) == kind


def test_fields_of_json_objects_keep_their_names() -> None:
    expected.check_nothing_lost("documents", {kind: program.fields_of(kind) for kind in kinds.JSON_KINDS})


def test_an_execution_decision_keeps_all_its_fields() -> None:
    decision = {"layout": 1, "compiled": True, "on": "NVIDIA H100, torch 2.9"}
    assert program.round_trip("execution decision", json.dumps(decision).encode()) == decision


def test_parquet_schemas_are_unchanged(archived: dict[str, bytes]) -> None:
    expected.check_equal("parquet", schemas(archived))
