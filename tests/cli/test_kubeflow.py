"""Test `submit`, `schedule` and `cancel` with the real client of kfp.

A server of the tests implements the API.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml

import pipeline
from semiscale import storage
from semiscale.cli import submit
from semiscale.cli.cancel import cancel
from semiscale.cli.kfp_client import Server, translate_api_errors
from semiscale.cli.main import main
from semiscale.cli.schedule import to_kfp_cron
from semiscale.cli.submit import compile_for
from semiscale.cli.watch import ABANDONED_AFTER_S
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config.resources import Resources
from semiscale.observability.task_status import RunStatusStore
from tests.support.kfp_server import KubeflowPipelines, serve_pipelines
from tests.support.run_statuses import write_status


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubeflowPipelines]:
    """Serve Kubeflow Pipelines at the address in kfp's own configuration."""
    for name in ("KUBECONFIG", "KF_PIPELINES_UI_ENDPOINT"):
        monkeypatch.setenv(name, str(tmp_path / "none") if name == "KUBECONFIG" else "https://kfp.example")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_pipelines() as (address, state):
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", address)
        yield state


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Write a run file for a cluster, on a folder that every pod mounts."""
    (tmp_path / "work").mkdir()
    uris = {name: f"file://{tmp_path}/{name}" for name in ("labeled", "unlabeled", "test")}
    return write_run_file(tmp_path, {"name": "birds", "workdir": f"file://{tmp_path}/work", **uris})


def write_run_file(folder: Path, content: dict[str, Any]) -> Path:
    """Write a run file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_verb(*arguments: str) -> int:
    """Run a verb, and return its exit code."""
    return main(pipeline.semiscale, arguments)


def test_a_run_is_submitted_with_the_run_files_values(
    kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    (run,) = kfp.resources["runs"]
    assert capsys.readouterr().out.splitlines()[-2] == f"https://kfp.example/#/runs/details/{run['run_id']}"
    assert (run["display_name"], run["service_account"]) == ("birds", "semiscale")
    assert kfp.names("experiments") == ["birds"]
    parameters = run["runtime_config"]["parameters"]
    assert parameters["images_per_class"] == 16_000
    assert parameters["labeled"] == [f"file://{run_file.parent}/labeled"]
    (version,) = kfp.resources["versions"]
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert version["pipeline_spec"] == compile_for(pipeline.semiscale, Resources())
    assert set(parameters) == set(
        next(yaml.safe_load_all(version["pipeline_spec"]))["root"]["inputDefinitions"]["parameters"]
    )
    assert RunStatusStore(f"file://{run_file.parent}/work", "birds").latest()[0].state == "submitted"


def test_the_same_pipeline_is_uploaded_once(kfp: KubeflowPipelines, run_file: Path) -> None:
    # There are more pipelines than a page of the listing has.
    for other in range(3):
        kfp.answer("POST", "/apis/v2beta1/pipelines/upload", {"name": f"other-{other}"}, {"file": ""})
    for _ in range(2):
        assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    assert kfp.names("pipelines") == ["other-0", "other-1", "other-2", "semiscale"]
    assert len(kfp.resources["versions"]) == 1
    assert len(kfp.resources["runs"]) == 2
    assert len(kfp.resources["experiments"]) == 1


def test_a_run_file_has_a_single_recurring_run(
    kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cron, word in (("0 2 * * *", "created"), ("0 2 * * *", "unchanged"), ("30 3 * * 1-5", "changed")):
        assert run_verb("schedule", str(run_file), "--cron", cron, "--images-on-nodes") == 0
        assert f"schedule 'birds' {word}" in capsys.readouterr().out
        (recurring,) = kfp.resources["recurringruns"]
        assert recurring["trigger"]["cron_schedule"]["cron"] == f"0 {cron}"
        assert (recurring["max_concurrency"], recurring["no_catchup"], recurring["mode"]) == ("1", True, "ENABLE")
        assert recurring["service_account"] == "semiscale"
    first = recurring["recurring_run_id"]
    run_file.write_text(run_file.read_text() + "images_per_class: 5\n")
    assert run_verb("schedule", str(run_file), "--cron", "30 3 * * 1-5", "--images-on-nodes") == 0
    (recurring,) = kfp.resources["recurringruns"]
    assert recurring["recurring_run_id"] != first
    assert recurring["runtime_config"]["parameters"]["images_per_class"] == 5


def test_duplicate_schedules_of_an_interruption_are_deleted(kfp: KubeflowPipelines, run_file: Path) -> None:
    command = ("schedule", str(run_file), "--cron", "0 2 * * *", "--images-on-nodes")
    assert run_verb(*command) == 0
    for number in range(4):
        kfp.resources["recurringruns"].append({**kfp.resources["recurringruns"][0], "recurring_run_id": str(number)})
    assert run_verb(*command) == 0
    assert len(kfp.resources["recurringruns"]) == 1


def test_runs_are_cancelled_by_id_and_by_run_file(
    kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    runs = kfp.resources["runs"]
    assert run_verb("cancel", runs[0]["run_id"]) == 0
    runs[1]["state"] = "SUCCEEDED"
    assert [run["state"] for run in runs] == ["CANCELING", "SUCCEEDED", "RUNNING", "RUNNING", "RUNNING"]
    assert (run_file.parent / "work" / "birds" / "cancelled.json").exists(), "the nodes of a TrainJob read it"
    assert run_verb("cancel", str(run_file)) == 0
    assert [run["state"] for run in runs] == ["CANCELING", "SUCCEEDED", "CANCELING", "CANCELING", "CANCELING"]
    assert run_verb("cancel", str(run_file)) == 2
    assert "[SEMI-E425]" in capsys.readouterr().err
    for run in runs[:2]:
        assert run_verb("cancel", run["run_id"]) == 2
        assert f"{run['state']}. Nothing is left to cancel. [SEMI-E440]" in capsys.readouterr().err


def test_a_schedule_is_deleted(kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("schedule", str(run_file), "--delete") == 2
    assert "[SEMI-E441]" in capsys.readouterr().err
    assert run_verb("schedule", str(run_file), "--cron", "0 2 * * *", "--images-on-nodes") == 0
    assert run_verb("schedule", str(run_file), "--delete") == 0
    assert not kfp.resources["recurringruns"]
    assert "schedule 'birds' deleted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run_verb("schedule", str(run_file), "--delete", "--cron", "0 2 * * *")


def test_the_message_of_a_refused_upload_is_shown(
    kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    # Another program uploads the same version between the look and the upload.
    monkeypatch.setattr(submit, "list_all", lambda *args, **options: [])
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 2
    assert re.search(r"the name semiscale already exist.*\[SEMI-E417\]", capsys.readouterr().err)


def test_a_second_run_of_an_active_name_is_refused_before_it_is_submitted(
    kfp: KubeflowPipelines, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_store = RunStatusStore(str(tmp_path / "work"), "birds")
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            now = time.time()
            write_status(status_store, "score-0", state="running", started=now, updated=now)
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(beat)
        try:
            while not status_store.all_attempts():
                time.sleep(0.01)
            assert run_verb("submit", str(run_file), "--images-on-nodes") == 2
        finally:
            ended.set()
    assert "[SEMI-E202]" in capsys.readouterr().err
    assert not kfp.resources["runs"]


def test_watch_asks_the_server_about_a_silent_run(
    kfp: KubeflowPipelines, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    (run,) = kfp.resources["runs"]
    long_ago = time.time() + 1 - ABANDONED_AFTER_S
    status_store = RunStatusStore(str(tmp_path / "work"), "birds")
    (tmp_path / "work" / "progress" / "birds" / "submitted.json").unlink()
    write_status(status_store, "plan", state="running", started=long_ago, updated=long_ago)
    assert run_verb("watch", str(run_file), "--once") == 0, "its pod may wait for a node"
    run["state"], run["error"] = "FAILED", {"code": 13, "message": "the pod was OOMKilled"}
    assert run_verb("watch", str(run_file)) == 1
    assert "the pod was OOMKilled" in capsys.readouterr().err


@pytest.mark.parametrize(("pods", "fan_out", "code"), [(17, "loop", 0), (18, "loop", 2), (18, "", 0), (1000, "job", 0)])
def test_a_run_whose_loops_argo_cannot_store_is_refused(
    kfp: KubeflowPipelines, run_file: Path, capsys: pytest.CaptureFixture[str], pods: int, fan_out: str, code: int
) -> None:
    rates = [0.1, 0.2, 0.3]
    content = yaml.safe_load(run_file.read_text())
    content |= {"pods": pods, "baseline_learning_rates": rates, "finetune_learning_rates": rates}
    content["hardware"] = {"scan": {"fan_out": fan_out}}
    run_file.write_text(yaml.safe_dump(content))
    assert run_verb("submit", str(run_file), "--images-on-nodes") == code
    assert ("or pods to 17 or less. [SEMI-E444]" in capsys.readouterr().err) == (code == 2)


def test_the_token_is_read_from_the_path_in_kfps_variable(
    kfp: KubeflowPipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InvalidInputError, match="runs abc not found"):
        cancel("abc", Server())
    assert "Bearer secret" in kfp.authorizations


@pytest.mark.parametrize(
    ("host", "code", "line"),
    [
        ("", 2, r"refused: --host: .*\[SEMI-E412\]$"),
        ("http://127.0.0.1:1", 1, r"failed: .*Connection refused.*\[SEMI-E419\]$"),
        ("served", 2, r"refused: .*ResourceNotFoundError: runs abc not found.*\[SEMI-E416\]$"),
        ("forbidden", 2, r"refused: .*\(403\): User 'a' is not authorized.*\[SEMI-E415\]$"),
    ],
)
def test_a_server_that_cannot_be_used_is_reported_in_one_line(
    kfp: KubeflowPipelines,
    host: str,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kfp.forbidden = host == "forbidden"
    if not host.startswith(("served", "forbidden")):
        monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    options = ["--host", host] if host.startswith("http") else []
    assert run_verb("cancel", "abc", *options) == code
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match(line, error), error


@pytest.mark.parametrize("arguments", [("submit",), ("schedule", "--cron", "0 2 * * *"), ("cancel",)])
def test_a_login_page_is_not_an_answer(
    kfp: KubeflowPipelines, run_file: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A login page has status 200.

    A run that no server received was once reported as submitted.
    """
    kfp.page = b"<!DOCTYPE html><html><title>Log in</title></html>"
    options = () if arguments[0] == "cancel" else ("--images-on-nodes",)
    assert run_verb(arguments[0], str(run_file), *arguments[1:], *options) == 2
    output = capsys.readouterr()
    assert (output.out, len(output.err.splitlines())) == ("", 1)
    assert output.err.startswith("refused: ")
    assert "[SEMI-E414]" in output.err


@pytest.mark.parametrize(
    ("token", "run", "line"),
    [
        ("/none/token", "abc", "KF_PIPELINES_SA_TOKEN_PATH: /none/token does not exist"),
        ("", "none.yaml", "cannot read"),
    ],
)
def test_a_missing_token_or_run_file_is_refused(
    kfp: KubeflowPipelines,
    token: str,
    run: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", token)
    assert run_verb("cancel", run) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "line"),
    [
        ({"student_architecture": "resnet5"}, [], "SEMI-E151"),
        ({"workdir": "runs"}, [], "workdir: runs is a path of this machine"),
        ({"unlabeled": ["/data/pool"]}, [], "unlabeled: /data/pool is a path of this machine"),
        ({}, [], "[SEMI-E422]"),
    ],
)
def test_an_impossible_run_is_refused_before_any_request(
    kfp: KubeflowPipelines,
    run_file: Path,
    changes: dict[str, Any],
    options: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run_file(run_file.parent, {**yaml.safe_load(run_file.read_text()), **changes})
    assert run_verb("submit", str(run_file), *options) == 2
    assert line in capsys.readouterr().err
    assert not any(kfp.resources.values())


def test_an_empty_bucket_is_refused_and_an_unreadable_bucket_is_left_to_the_plan(
    kfp: KubeflowPipelines,
    run_file: Path,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run_file(run_file.parent, {**yaml.safe_load(run_file.read_text()), "labeled": [f"{s3_bucket}/labeled"]})
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 2
    assert f"labeled: {s3_bucket}/labeled has no object" in capsys.readouterr().err
    for name, value in (("NO_GCE_CHECK", "true"), ("CLOUDSDK_CONFIG", str(run_file.parent)), ("HOME", "/none")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    storage._open_store.cache_clear()
    write_run_file(run_file.parent, {**yaml.safe_load(run_file.read_text()), "labeled": ["gs://mine/labeled"]})
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    assert "not checked from here: labeled: gs://mine/labeled: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cron", "line"),
    [
        ("60 2 * * *", "'60' is no minute. Use numbers from 0 to 59"),
        ("0 24 * * *", "'24' is no hour. Use numbers from 0 to 23"),
        ("0 2 0 * *", "'0' is no day. Use numbers from 1 to 31"),
        ("0 2 * 1,13 *", "'1,13' is no month. Use numbers from 1 to 12"),
        ("0 2 * * 1-7", "'1-7' is no weekday. Use numbers from 0 to 6"),
        ("61 0 2 * * *", "'61' is no second. Use numbers from 0 to 59"),
    ],
)
def test_a_cron_field_out_of_range_is_refused(cron: str, line: str) -> None:
    with pytest.raises(InvalidInputError, match=line):
        to_kfp_cron(cron)


@pytest.mark.parametrize("cron", ["*/90 0-23/2 1,31 JAN-DEC MON", "0 2 ? 12 0-6"])
def test_a_cron_expression_of_kubeflow_is_passed_on(cron: str) -> None:
    assert to_kfp_cron(cron) == f"0 {cron}"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidInputError), (409, InvalidInputError), (429, SemiscaleError), (500, SemiscaleError)],
)
def test_a_refusal_of_the_server_is_bad_input_and_its_failure_is_not(status: int, kind: type[SemiscaleError]) -> None:
    with pytest.raises(kind) as error, translate_api_errors():
        raise kfp_server_api.ApiException(status=status, reason="Because")
    assert type(error.value) is kind
    assert error.value.code == ("SEMI-E417" if kind is InvalidInputError else "SEMI-E418")
    assert f"({status}): Because" in str(error.value)


@pytest.mark.parametrize("cron", ["", "0 2 * *", "0 2 * * * * *", "0 2 * * $x", "every night"])
def test_an_invalid_cron_expression_is_refused(cron: str) -> None:
    with pytest.raises(InvalidInputError, match=r"SEMI-E423"):
        to_kfp_cron(cron)


def test_no_secret_is_sent_to_the_server(
    kfp: KubeflowPipelines, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    assert run_verb("submit", str(run_file), "--images-on-nodes") == 0
    assert "very-secret" not in json.dumps(kfp.resources)
