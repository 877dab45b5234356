"""Test the plan: listing, validation split, receipt, and refusal of bad input."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.cli.watch import terminal_task
from semiscale.common.errors import InvalidInputError, TooManyBadSamplesError
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields
from semiscale.observability.budget import BudgetUsage
from semiscale.observability.task_status import RunStatusStore, TaskStatus, announce_submission
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.entrypoints import run_as_task
from semiscale.stages.plan import concurrent_runs, shard_groups
from semiscale.stages.plan.label_checks import check_classes_match, check_classes_per_image
from semiscale.stages.plan.labeled_sets import LabeledSample, LabeledSet
from semiscale.stages.plan.stage import PlanConfig, plan
from tests.support import sample_images


def plan_run_file(content: dict[str, Any]) -> PlanReceipt:
    """Plan the content of a run file."""
    return plan(PlanConfig.model_validate(content))


def read_index(split: LabeledSplit) -> list[dict[str, Any]]:
    """Return the rows of a split's index."""
    return list(pq.read_table(io.BytesIO(storage.read_bytes(split.index))).to_pylist())


def test_all_kinds_of_sets_agree_on_the_classes(tmp_path: Path) -> None:
    receipt = plan_run_file(sample_images.write_run(tmp_path))
    assert receipt.classes == list(sample_images.CLASSES)
    assert (receipt.train.samples, receipt.validation.samples, receipt.test.samples) == (12, 12, 18)
    assert receipt.train.class_counts == [4, 4, 4]
    assert receipt.test.class_counts == [6, 6, 6]
    assert (receipt.shards, receipt.pods) == (3, 2)


def test_a_validation_split_is_held_out_stratified_and_recorded(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path, validation=[], validation_fraction=0.25)
    receipt = plan_run_file(content)
    assert receipt.train.class_counts == [3, 3, 3]
    assert receipt.validation.class_counts == [1, 1, 1]
    validation_keys, train_keys = (
        {row["key"] for row in read_index(split)} for split in (receipt.validation, receipt.train)
    )
    assert not validation_keys & train_keys
    assert any("held out 3 of 12 labeled images" in note for note in receipt.notes)


def test_without_a_list_classes_are_the_sorted_labels(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path, classes="", validation=[])
    shutil.rmtree(tmp_path / "data" / "test")
    sample_images.write_folders(tmp_path / "data" / "test", 2, seed=50)
    content["test"] = [str(tmp_path / "data" / "test")]
    assert plan_run_file(content).classes == ["blue", "green", "red"]


def test_more_classes_per_image_than_classes_is_clamped_and_noted(tmp_path: Path) -> None:
    receipt = plan_run_file(sample_images.write_run(tmp_path, classes_per_image=10))
    assert receipt.classes_per_image == 3
    assert "classes_per_image 10 clamped to the 3 classes there are" in receipt.notes


def test_a_second_plan_reuses_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = sample_images.write_run(tmp_path)
    assert plan_run_file(content) == plan_run_file(content)
    assert "finished before" in capsys.readouterr().out


def test_a_pool_that_grows_keeps_its_groups_and_the_digest_of_the_models(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    before = plan_run_file(content)
    sample_images.write_tar(tmp_path / "data" / "pool" / "pool-900.tar", {"x.png": sample_images.draw_png(0, 9)})
    after = plan_run_file(content)
    old, new = (
        {group["digest"] for group in json.loads(storage.read_bytes(receipt.units))} for receipt in (before, after)
    )
    assert old < new
    assert before.digest == after.digest
    assert before.pool_digest != after.pool_digest


def test_a_changed_shard_makes_a_new_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", 8_000_000)
    uris = [str(sample_images.write_pool(tmp_path / "pool", 3, 4))]
    (before,) = shard_groups.build_shard_groups(uris, str(tmp_path / "work"), SampleFields("image", ""))
    sample_images.write_tar(tmp_path / "pool" / "pool-001.tar", {"other.png": sample_images.draw_png(0, 1)})
    (after,) = shard_groups.build_shard_groups(uris, str(tmp_path / "work"), SampleFields("image", ""))
    assert len(before.shards) == len(after.shards) == 3
    assert before.digest != after.digest


def remove_folder(*path: str) -> Any:
    """Return a function that removes a folder below the test's root."""
    return lambda root, content: shutil.rmtree(root.joinpath(*path))


def set_key(key: str, value: Any) -> Any:
    """Return a function that sets a key of the run file."""
    return lambda root, content: content.update({key: value})


def add_empty_class(root: Path, content: dict[str, Any]) -> None:
    """Add a class folder without images to the labeled set."""
    (root / "data" / "labeled" / "purple").mkdir()


def add_unknown_class_to_test(root: Path, content: dict[str, Any]) -> None:
    """Replace the test set by an image of a class that is not listed."""
    path = root / "data" / "odd" / "odd.tar"
    content["test"] = [str(sample_images.write_tar(path, {"0.png": sample_images.draw_png(0, 0), "0.cls": b"mauve"}))]


def list_class_without_image(root: Path, content: dict[str, Any]) -> None:
    """List a class that no labeled image has."""
    (root / "data" / "classes.txt").write_text("red\ngreen\nblue\nviolet\n")


def leave_class_out_of_list(root: Path, content: dict[str, Any]) -> None:
    """List the classes without one that labeled images have."""
    (root / "data" / "classes.txt").write_text("red\ngreen\n")


def add_class_to_test_without_list(root: Path, content: dict[str, Any]) -> None:
    """Give a run without a list of classes a test set with a class that the labeled set lacks."""
    add_unknown_class_to_test(root, content)
    content["classes"], content["validation"] = "", []


def leave_single_image_of_class(root: Path, content: dict[str, Any]) -> None:
    """Leave a single image of a class, from which no split can be held out."""
    content["validation"] = []
    for path in sorted((root / "data" / "labeled" / "red").iterdir())[1:]:
        path.unlink()


def list_class_twice(root: Path, content: dict[str, Any]) -> None:
    """List a class twice."""
    (root / "data" / "classes.txt").write_text("red\ngreen\nblue\nred\n")


def write_classes_in_latin_1(root: Path, content: dict[str, Any]) -> None:
    """Write the list of classes in another encoding than UTF-8."""
    (root / "data" / "classes.txt").write_bytes("grün".encode("latin-1"))


def put_workdir_below_file(root: Path, content: dict[str, Any]) -> None:
    """Move the workdir below a file, where no folder can be created."""
    (root / "file").write_text("")
    content["workdir"] = str(root / "file" / "work")


def damage_labeled_image(root: Path, content: dict[str, Any]) -> None:
    """Truncate a labeled image."""
    path = root / "data" / "labeled" / "red" / "000.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (set_key("labeled", ["/nowhere/at/all"]), r"^/nowhere/at/all: nothing here"),
        (set_key("labeled", ["ftp://a/b"]), "'ftp'.*SEMI-E022"),
        (remove_folder("data", "pool"), "nothing here"),
        (add_empty_class, r"^labeled: class folder .*purple.*SEMI-E204"),
        (list_class_without_image, r"^labeled: .*violet.* key classes.*SEMI-E211"),
        (leave_class_out_of_list, r"^labeled: .*blue is not in .* key classes.*SEMI-E211"),
        (add_unknown_class_to_test, r"^test: .*mauve.* key classes.*blue, green, red.*SEMI-E211"),
        (add_class_to_test_without_list, r"^test: .*mauve is not in the labeled set.*SEMI-E211"),
        (leave_single_image_of_class, r"^labeled: class 'red' .*SEMI-E205"),
        (set_key("teacher_architecture", "resnet5O"), "teacher_architecture: .*'resnet5O'.* 'resnet50'.*SEMI-E151"),
        (set_key("student_architecture", "vgg"), r"^student_architecture: .*'vgg'.*SEMI-E151"),
        (set_key("classes", "/nowhere/classes.txt"), r"^classes: /nowhere/classes.txt .*SEMI-E134"),
        (set_key("image_column", "picture"), r"'picture'.*image_column.*image, label.*SEMI-E058"),
        (list_class_twice, r"^classes: .*'red'.*SEMI-E136"),
        (write_classes_in_latin_1, r"^classes: .*SEMI-E135"),
        (put_workdir_below_file, r"^workdir: .*SEMI-E209"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(tmp_path: Path, damage: Any, line: str) -> None:
    content = sample_images.write_run(tmp_path)
    damage(tmp_path, content)
    with pytest.raises(InvalidInputError, match=line) as refusal:
        plan_run_file(content)
    assert "\n" not in str(refusal.value)


def test_a_damaged_image_is_counted_by_reason_and_key(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path, max_failed_fraction=0.2)
    damage_labeled_image(tmp_path, content)
    receipt = plan_run_file(content)
    assert receipt.train.class_counts == [3, 4, 4]
    assert Counter(receipt.failed) == {"damaged image": 1}
    assert [failure.key for failure in receipt.failures] == ["red/000.png"]


def test_too_many_damaged_images_are_refused(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    damage_labeled_image(tmp_path, content)
    with pytest.raises(TooManyBadSamplesError, match=r"^labeled: 1 of 12 .* is red/000.png \(damaged.*SEMI-E203"):
        plan_run_file(content)


def test_a_folder_of_one_class_is_refused_with_the_expected_layout(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    content["labeled"] = [str(tmp_path / "data" / "labeled" / "red")]
    with pytest.raises(TooManyBadSamplesError, match=r"^labeled: 4 of 4 .*URI/CLASS/.*SEMI-E203"):
        plan_run_file(content)


def test_a_refused_run_file_can_be_corrected_under_the_same_name(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    with pytest.raises(InvalidInputError):
        plan_run_file({**content, "student_architecture": "resnet5"})
    with pytest.raises(InvalidInputError):
        plan_run_file({**content, "image_column": "picture"})
    assert plan_run_file(content).name == "trial"


def test_labels_that_are_long_numbers_are_names(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path, classes="", validation=[])
    long = "9" * 5000
    members: dict[str, bytes] = {}
    for number in range(6):
        members[f"{number}.png"] = sample_images.draw_png(number % 2, number)
        members[f"{number}.txt"] = (long if number % 2 else "7").encode()
    content["labeled"] = content["test"] = [str(sample_images.write_tar(tmp_path / "long.tar", members))]
    assert plan_run_file(content).classes == ["7", long]


def test_a_name_belongs_to_a_single_run_file(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    plan_run_file(content)
    with pytest.raises(InvalidInputError, match=r"^name: .*'trial'.*\(seed: 0, now 5\).*SEMI-E210"):
        plan_run_file({**content, "seed": 5})


def test_keys_that_change_no_result_may_change_under_the_same_name(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    before = plan_run_file(content)
    path = Path(str(content["workdir"])) / "trial" / "run.json"
    # An earlier version stored the pods too.
    path.write_text(json.dumps({**json.loads(path.read_text()), "pods": content["pods"]}))
    changes = {"pods": 3, "retrain_above": 0.5, "promotion": "never", "champion": "ours", "budget_hours": 2.0}
    changes["max_failed_fraction"] = 0.5
    after = plan_run_file({**content, **changes})
    assert (after.digest, after.pool_digest, after.pods) == (before.digest, before.pool_digest, 3)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_refused_as_a_workdir(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    missing = f"{request.getfixturevalue(f'{scheme}_bucket')}-missing"
    content = sample_images.write_run(tmp_path, workdir=f"{missing}/work")
    with pytest.raises(InvalidInputError, match=rf"^workdir: {missing}/work .*no such bucket.*SEMI-E209"):
        plan_run_file(content)


def test_a_client_without_credentials_is_refused_as_a_workdir(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # The session of earlier clients keeps its credentials.
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    storage._open_store.cache_clear()
    content = sample_images.write_run(tmp_path, workdir=f"{s3_bucket}/work")
    with pytest.raises(InvalidInputError, match=rf"^workdir: {s3_bucket}/work .*credentials.*SEMI-E209"):
        plan_run_file(content)


def start_run(content: dict[str, Any]) -> PlanReceipt:
    """Plan as the first task of a run, with a status object."""
    return run_as_task(PlanConfig.model_validate(content), plan)


def test_a_second_run_of_one_name_is_refused_while_the_first_is_active(tmp_path: Path) -> None:
    # The status of the first run stays, so `watch` continues and the budget still counts all device time.
    content = sample_images.write_run(tmp_path)
    start_run(content)
    status_store = RunStatusStore(str(content["workdir"]), "trial")
    now = time.time()
    spent = TaskStatus(task="train-teacher-1.0", stage="train", pod="", state="finished", started=now, updated=now)
    storage.write_bytes(
        status_store.uri(spent.task), spent.model_copy(update={"device_s": 7200.0}).model_dump_json().encode()
    )
    script = (
        "import sys, time; from semiscale.observability import status_reporter as reporter\n"
        "reporter.HEARTBEAT_INTERVAL_S = 0.2\n"
        "from semiscale.observability.task_status import RunStatusStore\n"
        "with reporter.report_status(RunStatusStore(sys.argv[1], 'trial'), 'score-0', 'score'):\n"
        "    print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(content["workdir"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        while len(status_store.current_tasks()) < 3:
            pass
        # `submit` and `run` announce the submission first.
        announce_submission(str(content["workdir"]), "trial")
        with pytest.raises(InvalidInputError, match=r"^name: .*'trial'.*score-0.*SEMI-E202"):
            start_run(content)
        assert [task.task for task in status_store.current_tasks()] == ["plan", "train-teacher-1.0", "score-0"]
        assert [task.task for task in status_store.latest()] == ["plan", "train-teacher-1.0", "score-0"]
        assert BudgetUsage(status_store.current_tasks()).device_s == 7200.0
        assert terminal_task(status_store.latest(), time.time()) is None
        other.kill()
        other.wait()
        assert start_run(content).name == "trial"
        assert [task.task for task in status_store.current_tasks()] == ["plan"]


def test_an_active_plan_is_an_active_run(tmp_path: Path) -> None:
    content = sample_images.write_run(tmp_path)
    script = (
        "import sys, time; from semiscale.observability import status_reporter as reporter\n"
        "reporter.HEARTBEAT_INTERVAL_S = 0.2\n"
        "from semiscale.observability.task_status import RunStatusStore\n"
        "with reporter.report_status(RunStatusStore(sys.argv[1], 'trial'), 'plan', 'plan'):\n"
        "    print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(content["workdir"])], stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        while not RunStatusStore(str(content["workdir"]), "trial").current_tasks():
            pass
        with pytest.raises(InvalidInputError, match=r"for plan sends.*SEMI-E202"):
            start_run(content)
        other.kill()


def test_the_status_of_a_dead_pod_delays_a_run_only_briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sample_images.write_run(tmp_path)
    status_store = RunStatusStore(str(content["workdir"]), "trial")
    task = TaskStatus(task="score-0", stage="score", pod="elsewhere", state="running", started=1.0, updated=9e9)
    storage.write_bytes(status_store.uri("score-0"), task.model_dump_json().encode())
    monkeypatch.setattr(concurrent_runs, "HEARTBEAT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(concurrent_runs, "POLL_INTERVAL_S", 0.1)
    assert start_run(content).name == "trial"


def test_a_pool_inside_another_is_used_once_or_refused(tmp_path: Path) -> None:
    # A tar that is listed twice is one shard. A loose image would be in two shards.
    uris = [
        str(sample_images.write_pool(tmp_path / "pool", 2, 5)),
        str(sample_images.write_pool(tmp_path / "pool" / "b", 1, 5)),
    ]
    groups = shard_groups.build_shard_groups(uris, str(tmp_path / "work"), SampleFields())
    names = sorted(shard.name for group in groups for shard in group.shards)
    assert names == ["b/pool-000.tar", "pool-000.tar", "pool-001.tar"]
    (tmp_path / "pool" / "b" / "0.png").write_bytes(sample_images.draw_png(0, 1))
    assert shard_groups.build_shard_groups([uris[0], uris[0]], str(tmp_path / "work"), SampleFields())
    with pytest.raises(InvalidInputError, match=r"^unlabeled: .*/pool/b/0\.png .*SEMI-E201"):
        shard_groups.build_shard_groups(uris, str(tmp_path / "work"), SampleFields())


def test_pools_of_equal_names_are_used_together(tmp_path: Path) -> None:
    for pool in ("a", "b"):
        sample_images.write_pool(tmp_path / pool, 2, 5)
        (tmp_path / pool / "0.png").write_bytes(sample_images.draw_png(0, 1))
    before, after = (
        {
            shard.name: shard
            for group in shard_groups.build_shard_groups(uris, str(tmp_path / "work"), SampleFields())
            for shard in group.shards
        }
        for uris in ([str(tmp_path / "a")], [str(tmp_path / "a"), str(tmp_path / "b")])
    )
    names = ["files from 0.png", "pool-000.tar", "pool-001.tar"]
    assert sorted(before) == names
    assert sorted(after) == sorted([*names, *(f"b/{name}" for name in names)])
    assert all(after[name] == before[name] for name in names)


def test_more_classes_than_a_score_file_can_number_are_refused() -> None:
    classes = [f"class {number}" for number in range(65_537)]
    labeled = LabeledSet("labeled", [], [LabeledSample(0, 0, "", name) for name in classes], [])
    with pytest.raises(InvalidInputError, match=r"^labeled: 65,537 .* 65,536 .*SEMI-E213"):
        check_classes_match(labeled, classes, "labeled")
    with pytest.raises(InvalidInputError, match=r"^classes_per_image: 300 .* 256 .*SEMI-E214"):
        check_classes_per_image(300, 1000)
    check_classes_per_image(300, 256)
