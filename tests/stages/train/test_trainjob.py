"""A training on many nodes: the TrainJob fits Kubeflow's schema, and is followed to its end over a real HTTP API."""

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
from semiscale.stages.train import trainjob
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.stage import train
from tests.observability.test_metrics_endpoint import scraped
from tests.support.cluster import JOBS, RIGHTS, Cluster, serving_cluster
from tests.support.servers import free_port
from tests.support.stages import Stages
from tests.support.trainings import config_of, vouchers

SCHEMA = Path(__file__).resolve().parents[2] / "schemas" / "trainer.kubeflow.org_v1alpha1_TrainJob.json"
MACHINE = {"nodes": 4, "gpus": 8, "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}}
LAUNCHED = TrainJobSettings.model_validate(
    {"image": "r/cuda@sha256:0", "machine": MACHINE, "queue": "gpus", "priority": "low"}
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A training whose plan was handed to it as a copy, as kfp does."""
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
    """A cluster that this process and its children are led to."""
    with (
        serving_cluster(tmp_path_factory.mktemp("cluster")) as (cluster, kubeconfig),
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("KUBECONFIG", str(kubeconfig))  # the client reads it once
        m.setenv("NO_PROXY", "127.0.0.1")
        yield cluster


@pytest.fixture
def cluster(server: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster with nothing in it, and a pod that is to start four nodes."""
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    monkeypatch.setattr(trainjob, "POLL_INTERVAL_S", 1)
    server.clear()
    return server


@pytest.fixture
def start(config: TrainConfig) -> Iterator[Callable[[], Future[TrainReceipt]]]:
    """Begin to train, in a thread."""
    with ThreadPoolExecutor() as pool:
        yield lambda: pool.submit(train, config)


def leave_receipt(config: TrainConfig) -> None:
    """Do what the nodes do at last."""
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
def started(config: TrainConfig) -> Iterator["subprocess.Popen[str]"]:
    """The stage in a process of its own, which ends with the test."""
    with subprocess.Popen(command(config), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def command(config: TrainConfig) -> list[str]:
    """The stage from a shell."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    return [sys.executable, "-m", "semiscale.stages.train", *options]


@pytest.mark.parametrize("machine", [MACHINE, {"nodes": 2, "gpus": 0, "shared_memory": "", "tolerations": []}])
def test_the_object_fits_the_schema(config: TrainConfig, machine: dict[str, Any]) -> None:
    launch = LAUNCHED.model_copy(update={"machine": type(LAUNCHED.machine).model_validate(machine)})
    schema = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    job = trainjob.build_trainjob(config, launch)
    schema.validate(job)
    assert not schema.is_valid(job | {"spec": job["spec"] | {"nodes": 4}})


def test_the_nodes_get_the_hardware_and_the_stages_own_options(config: TrainConfig, tmp_path: Path) -> None:
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
    options = dict(one.removeprefix("--").split("=", 1) for one in trainer["args"])
    assert set(options) == {name.replace("_", "-") for name in TrainConfig.model_fields}
    assert options["plan"] == f"{tmp_path}/work/stages/plan/d/receipt.json", "a node has no copy of the receipt"


def test_two_nodes_train_by_what_the_object_says(tmp_path: Path) -> None:
    """Its very command, by two processes told what Kubeflow's torch runtime tells its nodes."""
    stages = Stages(tmp_path)
    config = config_of(stages, str(stages.workdir), images_processed=60, checkpoint_minutes=10)
    launch = LAUNCHED.model_copy(update={"machine": type(LAUNCHED.machine)(nodes=2, gpus=0)})
    trainer = trainjob.build_trainjob(config, launch)["spec"]["trainer"]
    command = [str(Path(sys.executable).with_name("torchrun")), *trainer["command"][1:], *trainer["args"]]
    told = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    own = {one["name"]: one["value"] for one in trainer["env"] if one["name"] != PORT_ENV}
    nodes = [
        subprocess.Popen(
            command, env={**os.environ, **own, **told, "PET_NODE_RANK": str(number), TERMINATION_LOG_ENV: ""},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (said[0].count("validation top-1"), said[1].count("validation top-1")) == (1, 0), "one speaks for all"
    (voucher,) = vouchers(config)
    assert json.loads(storage.read_bytes(voucher))["moment"]["ranks"] == 2
    assert train(config).images_processed == 60, "its receipt is found"


def test_a_training_is_followed_to_its_receipt(
    cluster: Cluster,
    config: TrainConfig,
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = written(lambda: log_info("train", "480 of 960 images · 50%"), "json", monkeypatch)
    running = start()
    name = cluster.created()
    assert name == f"semiscale-{config.digest()}"
    cluster.add_pod(name, 0, f"one\n{said}")
    cluster.refusing = 2  # the API server is away for a while
    log = f"GET /api/v1/namespaces/lab/pods/{name}-node-0-0/log"
    while log not in cluster.requests:
        assert not running.done()
    leave_receipt(config)
    cluster.end(name, "Complete")
    assert running.result(120).digest == config.digest()
    assert "node 0: 480 of 960 images · 50%" in capsys.readouterr().out
    assert cluster.jobs == {}, "it is deleted when it is complete"
    assert cluster.used == RIGHTS, "the manifests give no right that is not used"
    assert start().result(120).digest == config.digest()
    assert cluster.requests.count(f"POST {JOBS}") == 1, "finished work asks the cluster for nothing"


def written(act: Callable[[], None], log: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a node writes, which has no terminal, to its log; SEMISCALE_LOG may be set there."""
    text = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        patched.setenv(LOG_FORMAT_ENV, log)
        act()
    return text.getvalue()


@pytest.mark.parametrize(("log", "in_status"), [("", False), ("plain", False), ("plain", True)])
@pytest.mark.parametrize(
    ("line", "kind", "code", "message"),
    [
        ("refused: train: no GPU is like this", InvalidInputError, 2, "train: no GPU is like this (semiscale-"),
        ("failed: train: the loss is nan", SemiscaleError, 1, "train: the loss is nan (semiscale-"),
        ("failed: budget_hours: spent", SemiscaleError, 3, "budget_hours: spent (semiscale-"),
        ("Killed", SemiscaleError, 1, "Killed (semiscale-"),
    ],
)
def test_a_nodes_failure_is_the_stages_own(
    cluster: Cluster, start: Any, log: str, in_status: bool, line: str, kind: type[SemiscaleError], code: int,
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    status = tmp_path / "termination-log"
    status.touch()  # as Kubernetes does
    if in_status:
        monkeypatch.setenv(TERMINATION_LOG_ENV, str(status))
    if line != "Killed":
        line = written(lambda: log_fatal(line, code), log, monkeypatch).strip()
    running = start()
    name = cluster.created()
    cluster.add_pod(name, 0, "torch: connection closed by peer", exit_code=1, finished=7)
    said = f"train · 10 images\n{line}\n" + "torchrun says a page\n" * 9 * (line != "Killed")
    cluster.add_pod(name, 1, said, exit_code=1, finished=5, message=status.read_text())
    cluster.end(name, "Failed", "Job failed")
    with pytest.raises(kind) as error:
        running.result(120)
    assert type(error.value) is kind
    assert error.value.exit_code == (1 if log and code == 3 and not in_status else code), "text does not say it"
    assert str(error.value).startswith(message)
    assert "node-0-1, exit code 1" in str(error.value)
    assert name in cluster.jobs, "kept for its logs"


def test_the_first_rank_that_stops_says_why_in_the_pods_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "termination-log"
    monkeypatch.setenv(TERMINATION_LOG_ENV, str(status))
    log_fatal("failed: no such file, which is no reason to stop otherwise", 1)
    status.touch()
    for code, line in ((3, "failed: budget_hours: spent"), (1, "failed: connection closed by peer")):
        log_fatal(line, code)
    told = parse_failure(status.read_text())
    assert told
    assert (str(told), told.exit_code) == ("budget_hours: spent", 3)


def test_a_ready_made_teacher_is_checked_by_one_device(cluster: Cluster, config: TrainConfig, tmp_path: Path) -> None:
    """Every rank of four nodes would read and check it, all of a node on its first GPU."""
    (tmp_path / "teacher.pth").touch()
    ready_made = config.model_copy(update={"checkpoint": str(tmp_path / "teacher.pth")})
    with ThreadPoolExecutor() as pool:
        running = pool.submit(train, ready_made)
        name = cluster.created()
        trainer = cluster.jobs[name]["spec"]["trainer"]
        leave_receipt(ready_made)
        cluster.end(name, "Complete")
        running.result(120)
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 1


def test_a_failure_without_pods_says_what_kubeflow_says(cluster: Cluster, start: Any) -> None:
    running = start()
    cluster.end(cluster.created(), "Failed", "no such runtime")
    with pytest.raises(SemiscaleError, match="no such runtime.*SEMI-E260"):
        running.result(120)


def test_a_failed_trainjob_of_an_earlier_try_is_replaced(cluster: Cluster, config: TrainConfig, start: Any) -> None:
    cluster.put(trainjob.build_trainjob(config, LAUNCHED))
    name = next(iter(cluster.jobs))
    cluster.end(name, "Failed")
    running = start()
    assert cluster.created() == name
    leave_receipt(config)
    cluster.end(name, "Complete")
    running.result(120)


def test_complete_without_a_receipt_is_a_failure(cluster: Cluster, start: Any) -> None:
    running = start()
    cluster.end(cluster.created(), "Complete")
    with pytest.raises(SemiscaleError, match="SEMI-E256"):
        running.result(120)


def test_a_deleted_trainjob_is_a_failure(cluster: Cluster, start: Any) -> None:
    running = start()
    del cluster.jobs[cluster.created()]
    with pytest.raises(SemiscaleError, match="SEMI-E258"):
        running.result(120)


def test_a_refusal_of_the_cluster_is_one_line(cluster: Cluster, start: Any) -> None:
    cluster.refusing, cluster.refusal = 1, 403
    with pytest.raises(InvalidInputError, match=r"\(403\).*SEMI-E261"):
        start().result(120)


def test_sigterm_deletes_the_trainjob(cluster: Cluster, config: TrainConfig) -> None:
    with started(config) as process:
        cluster.created()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.startswith("failed: SIGTERM")
    assert cluster.jobs == {}


def test_the_pod_that_follows_tells_prometheus_that_it_does(
    cluster: Cluster, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far the training is, its first node tells: counted once."""
    plan = {**json.loads(storage.read_bytes(config.plan)), "name": "trial", "run": {}}
    storage.write_bytes(config.plan, json.dumps(plan).encode())
    port = free_port()
    monkeypatch.setenv(PORT_ENV, str(port))
    with started(config) as process:
        cluster.created()
        found = scraped(port)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    ((labels, elapsed_s),) = found["semiscale_elapsed_seconds"]
    assert (labels, elapsed_s > 0) == ({"stage": "train", "task": config.task_name()}, True)
    assert "semiscale_done_total" not in found


def test_a_pod_that_comes_back_finds_its_trainjob_running(cluster: Cluster, config: TrainConfig) -> None:
    def finish() -> None:
        leave_receipt(config)
        cluster.end(name, "Complete")

    with started(config) as process:
        name = cluster.created()
        process.kill()
    with started(config) as again:
        assert again.stdout
        assert "found, it goes on" in again.stdout.readline()
        finish()
        again.communicate(timeout=120)
    assert again.returncode == 0
    assert cluster.requests.count(f"POST {JOBS}") == 1
