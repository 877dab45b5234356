"""Test a training on several nodes.

The TrainJob must fit Kubeflow's schema. The stage watches it to its end, over a real HTTP API.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config.resources import TRAINJOB_ENV, TrainJobSettings
from semiscale.data.preprocessing import Preprocessing
from semiscale.observability.progress import LOG_FORMAT_ENV, TERMINATION_LOG_ENV, log_fatal, log_info, parse_failure
from semiscale.observability.prometheus import PORT_ENV
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime import job_client
from semiscale.stages.train import trainjob
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.observability.test_metrics_endpoint import scrape
from tests.support.cluster import JOBS, RIGHTS, Cluster, serve_cluster
from tests.support.servers import find_free_port
from tests.support.stages import Stages
from tests.support.trainings import list_checkpoints, training_config

SCHEMA = Path(__file__).resolve().parents[2] / "schemas" / "trainer.kubeflow.org_v1alpha1_TrainJob.json"
MACHINE = {"nodes": 4, "gpus": 8, "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}}
LAUNCHED = TrainJobSettings.model_validate(
    {"image": "r/cuda@sha256:0", "machine": MACHINE, "queue": "gpus", "priority": "low"}
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return a training whose plan is a copy, which is how kfp passes it."""
    plan = {"digest": "d", "folder": str(tmp_path / "work" / "stages" / "plan" / "d")}
    storage.write_bytes(str(tmp_path / "copies" / "plan"), json.dumps(plan).encode())
    return TrainConfig(
        workdir=str(tmp_path / "work"),
        recipe="teacher",
        architecture="resnet8_small",
        plan=str(tmp_path / "copies" / "plan"),
        images_processed=960,
        learning_rate=0.1,
        batch_size=12,
        weight_decay=0.0,
        resolution=8,
        augmentation="shift",
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Serve a cluster that the kubeconfig of this process and its children names."""
    with (
        serve_cluster(tmp_path_factory.mktemp("cluster")) as (cluster, kubeconfig),
        pytest.MonkeyPatch.context() as m,
    ):
        # The client reads the variable once.
        m.setenv("KUBECONFIG", str(kubeconfig))
        m.setenv("NO_PROXY", "127.0.0.1")
        yield cluster


@pytest.fixture
def cluster(server: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Return an empty cluster, and let the stage start four nodes."""
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    monkeypatch.setattr(job_client, "POLL_INTERVAL_S", 1)
    server.clear()
    return server


@pytest.fixture
def start(config: TrainConfig) -> Iterator[Callable[[], Future[TrainReceipt]]]:
    """Return a function that starts the stage in a thread."""
    with ThreadPoolExecutor() as pool:
        yield lambda: pool.submit(train, config)


def leave_receipt(config: TrainConfig) -> None:
    """Write the receipt, as the nodes do at the end."""
    receipt = TrainReceipt(
        stage="train",
        digest=config.digest(),
        folder=config.folder(),
        seconds=1.0,
        recipe="teacher",
        architecture=config.architecture,
        checkpoint="c",
        parameters=1,
        classes=["a"],
        preprocessing=Preprocessing(resolution=8, augmentation="shift"),
        images_processed=960,
        samples=16,
        learning_rate=0.1,
        validation_top1=1.0,
        curve=[],
        images_per_s=1.0,
    )
    storage.write_bytes(storage.join(config.folder(), "receipt.json"), receipt.model_dump_json().encode())


@contextmanager
def running_stage(config: TrainConfig) -> Iterator["subprocess.Popen[str]"]:
    """Run the stage in a process of its own, which is killed at the end of the block."""
    with subprocess.Popen(command(config), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def command(config: TrainConfig) -> list[str]:
    """Return the command line of the stage."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    return [sys.executable, "-m", "semiscale.stages.train", *options]


@pytest.mark.parametrize("machine", [MACHINE, {"nodes": 2, "gpus": 0, "shared_memory": "", "tolerations": []}])
def test_the_trainjob_fits_the_schema(config: TrainConfig, machine: dict[str, Any]) -> None:
    launch = LAUNCHED.model_copy(update={"machine": type(LAUNCHED.machine).model_validate(machine)})
    schema = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    job = trainjob.build_trainjob(config, launch)
    schema.validate(job)
    assert not schema.is_valid(job | {"spec": job["spec"] | {"nodes": 4}})


def test_the_trainjob_has_the_hardware_and_the_options_of_the_stage(config: TrainConfig, tmp_path: Path) -> None:
    job = trainjob.build_trainjob(config, LAUNCHED)
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert trainer["image"] == "r/cuda@sha256:0"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 8
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = node["template"]["spec"]["template"]
    assert template["spec"]["nodeSelector"] == MACHINE["node_selector"]
    assert {"name": "SEMISCALE_METRICS_PORT", "value": template["metadata"]["annotations"]["prometheus.io/port"]} in (
        trainer["env"]
    )
    assert {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "110"} in trainer["env"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    options = dict(option.removeprefix("--").split("=", 1) for option in trainer["args"])
    assert set(options) == {name.replace("_", "-") for name in TrainConfig.model_fields}
    assert options["plan"] == f"{tmp_path}/work/stages/plan/d/receipt.json", "a node has no copy of the receipt"


def test_two_nodes_train_with_the_command_of_the_trainjob(tmp_path: Path) -> None:
    """Run the command in two processes, with the variables of Kubeflow's runtime."""
    stages = Stages(tmp_path)
    config = training_config(stages, str(stages.workdir), images_processed=60, checkpoint_minutes=10)
    launch = LAUNCHED.model_copy(update={"machine": type(LAUNCHED.machine)(nodes=2, gpus=0)})
    trainer = trainjob.build_trainjob(config, launch)["spec"]["trainer"]
    command = [str(Path(sys.executable).with_name("torchrun")), *trainer["command"][1:], *trainer["args"]]
    runtime_env = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(find_free_port()),
    }
    trainjob_env = {variable["name"]: variable["value"] for variable in trainer["env"] if variable["name"] != PORT_ENV}
    nodes = [
        subprocess.Popen(
            command,
            env={**os.environ, **trainjob_env, **runtime_env, "PET_NODE_RANK": str(number), TERMINATION_LOG_ENV: ""},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [output.count("validation top-1") for output in outputs] == [1, 0], "rank 0 logs for all"
    (manifest,) = list_checkpoints(config)
    assert json.loads(storage.read_bytes(manifest))["moment"]["ranks"] == 2
    assert train(config).images_processed == 60, "the stage returns the receipt of the nodes"


def test_the_stage_watches_the_trainjob_until_its_receipt(
    cluster: Cluster,
    config: TrainConfig,
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = capture_output(lambda: log_info("train", "480 of 960 images · 50%"), "json", monkeypatch)
    running = start()
    name = cluster.wait_until_created()
    assert name == f"semiscale-{config.digest()}"
    cluster.add_pod(name, 0, f"one\n{line}")
    # The API server does not answer for a while.
    cluster.refusing = 2
    log = f"GET /api/v1/namespaces/lab/pods/{name}-node-0-0/log"
    while log not in cluster.requests:
        assert not running.done()
    leave_receipt(config)
    cluster.end(name, "Complete")
    assert running.result(120).digest == config.digest()
    assert "node 0: 480 of 960 images · 50%" in capsys.readouterr().out
    assert cluster.jobs == {}, "a complete TrainJob is deleted"
    needed = {right for right in RIGHTS if right[0] != "jobs"}
    assert cluster.used == needed, "the manifests give no right that is not needed"
    assert start().result(120).digest == config.digest()
    assert cluster.requests.count(f"POST {JOBS}") == 1, "a finished training does not create a TrainJob"


def capture_output(act: Callable[[], None], log: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the output of a node without a terminal, whose SEMISCALE_LOG is `log`."""
    text = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        patched.setenv(LOG_FORMAT_ENV, log)
        act()
    return text.getvalue()


@pytest.mark.parametrize(("log", "in_status"), [("", False), ("plain", False), ("plain", True)])
@pytest.mark.parametrize(
    ("line", "error_type", "code", "message"),
    [
        ("refused: train: no GPU is like this", InvalidInputError, 2, "train: no GPU is like this (semiscale-"),
        ("failed: train: the loss is nan", SemiscaleError, 1, "train: the loss is nan (semiscale-"),
        ("failed: budget_hours: spent", SemiscaleError, 3, "budget_hours: spent (semiscale-"),
        ("Killed", SemiscaleError, 1, "Killed (semiscale-"),
    ],
)
def test_the_failure_of_a_node_is_the_failure_of_the_stage(
    cluster: Cluster, start: Any, log: str, in_status: bool, line: str, error_type: type[SemiscaleError], code: int,
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    status = tmp_path / "termination-log"
    # Kubernetes creates the file.
    status.touch()
    if in_status:
        monkeypatch.setenv(TERMINATION_LOG_ENV, str(status))
    if line != "Killed":
        line = capture_output(lambda: log_fatal(line, code), log, monkeypatch).strip()
    running = start()
    name = cluster.wait_until_created()
    cluster.add_pod(name, 0, "torch: connection closed by peer", exit_code=1, finished=7)
    log_text = f"train · 10 images\n{line}\n" + "torchrun says a page\n" * 9 * (line != "Killed")
    cluster.add_pod(name, 1, log_text, exit_code=1, finished=5, message=status.read_text())
    cluster.end(name, "Failed", "Job failed")
    with pytest.raises(error_type) as error:
        running.result(120)
    assert type(error.value) is error_type
    assert error.value.exit_code == (1 if log and code == 3 and not in_status else code), (
        "a line of text has no exit code"
    )
    assert str(error.value).startswith(message)
    assert "node-0-1, exit code 1" in str(error.value)
    assert name in cluster.jobs, "a failed TrainJob is kept for its logs"


def test_the_status_of_a_pod_has_the_reason_of_the_first_rank_that_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "termination-log"
    monkeypatch.setenv(TERMINATION_LOG_ENV, str(status))
    log_fatal("failed: no such file, which is no reason to stop otherwise", 1)
    status.touch()
    for code, line in ((3, "failed: budget_hours: spent"), (1, "failed: connection closed by peer")):
        log_fatal(line, code)
    failure = parse_failure(status.read_text())
    assert failure
    assert (str(failure), failure.exit_code) == ("budget_hours: spent", 3)


def test_a_pretrained_teacher_is_checked_on_one_device(cluster: Cluster, config: TrainConfig, tmp_path: Path) -> None:
    # Otherwise every rank of four nodes would check it, and all ranks of a node would use its first GPU.
    (tmp_path / "teacher.pth").touch()
    pretrained = config.model_copy(update={"checkpoint": str(tmp_path / "teacher.pth")})
    with ThreadPoolExecutor() as pool:
        running = pool.submit(train, pretrained)
        name = cluster.wait_until_created()
        trainer = cluster.jobs[name]["spec"]["trainer"]
        leave_receipt(pretrained)
        cluster.end(name, "Complete")
        running.result(120)
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 1


def test_a_failure_without_pods_has_the_message_of_kubeflow(cluster: Cluster, start: Any) -> None:
    running = start()
    cluster.end(cluster.wait_until_created(), "Failed", "no such runtime")
    with pytest.raises(SemiscaleError, match="no such runtime.*SEMI-E260"):
        running.result(120)


def test_a_failed_trainjob_of_an_earlier_attempt_is_replaced(cluster: Cluster, config: TrainConfig, start: Any) -> None:
    cluster.put(trainjob.build_trainjob(config, LAUNCHED))
    name = next(iter(cluster.jobs))
    cluster.end(name, "Failed")
    running = start()
    assert cluster.wait_until_created() == name
    leave_receipt(config)
    cluster.end(name, "Complete")
    running.result(120)


def test_a_complete_trainjob_without_a_receipt_is_a_failure(cluster: Cluster, start: Any) -> None:
    running = start()
    cluster.end(cluster.wait_until_created(), "Complete")
    with pytest.raises(SemiscaleError, match="SEMI-E256"):
        running.result(120)


def test_a_deleted_trainjob_is_a_failure(cluster: Cluster, start: Any) -> None:
    running = start()
    del cluster.jobs[cluster.wait_until_created()]
    with pytest.raises(SemiscaleError, match="SEMI-E258"):
        running.result(120)


def test_the_error_of_a_refused_request_is_one_line(cluster: Cluster, start: Any) -> None:
    cluster.refusing, cluster.refusal = 1, 403
    with pytest.raises(InvalidInputError, match=r"\(403\).*SEMI-E261"):
        start().result(120)


def test_sigterm_deletes_the_trainjob(cluster: Cluster, config: TrainConfig) -> None:
    with running_stage(config) as process:
        cluster.wait_until_created()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.startswith("failed: SIGTERM")
    assert cluster.jobs == {}


def test_the_watching_pod_exports_its_time_but_no_progress(
    cluster: Cluster, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Node 0 exports the progress, which would otherwise be counted twice.
    plan = {**json.loads(storage.read_bytes(config.plan)), "name": "trial", "run": {}}
    storage.write_bytes(config.plan, json.dumps(plan).encode())
    port = find_free_port()
    monkeypatch.setenv(PORT_ENV, str(port))
    with running_stage(config) as process:
        cluster.wait_until_created()
        metrics = scrape(port)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    ((labels, elapsed_s),) = metrics["semiscale_elapsed_seconds"]
    assert (labels, elapsed_s > 0) == ({"stage": "train", "task": config.task_name()}, True)
    assert "semiscale_done_total" not in metrics


def test_a_restarted_pod_attaches_to_its_running_trainjob(cluster: Cluster, config: TrainConfig) -> None:
    def finish() -> None:
        leave_receipt(config)
        cluster.end(name, "Complete")

    with running_stage(config) as process:
        name = cluster.wait_until_created()
        process.kill()
    with running_stage(config) as restarted:
        assert restarted.stdout
        assert "found, it goes on" in restarted.stdout.readline()
        finish()
        restarted.communicate(timeout=120)
    assert restarted.returncode == 0
    assert cluster.requests.count(f"POST {JOBS}") == 1
