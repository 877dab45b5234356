"""Test a scan by an Indexed Job with Kubernetes' own Job controller. Its pods are processes of this machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from semiscale.config.resources import INDEXED_JOB_ENV, IndexedJobSettings
from semiscale.observability.task_status import announce_cancellation
from semiscale.receipts.score import ScoreReceipt
from semiscale.runtime.job_client import end_condition
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.score_store import score_folder
from tests.deployment.test_api_server import FOREIGN_KINDS, build_definition
from tests.deployment.test_manifests import MANIFESTS
from tests.support import sample_images
from tests.support.api_server import CONTROLLERS, PROGRAMS, ApiServer, find_program, run_controllers, serve_api
from tests.support.kubelet import Kubelet, PodProcess, run_kubelet
from tests.support.kustomize import build
from tests.support.stages import Stages

pytestmark = pytest.mark.slow

NAMESPACE = "semiscale"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
QUOTA = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas/semiscale"
FAULTS = Path(__file__).resolve().parents[1] / "support" / "scan_faults"
FOLLOWER = "follower"
# The pod that a Kubeflow task would have. No kubelet runs it.
FOLLOWER_POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": FOLLOWER},
    "spec": {
        "serviceAccountName": "semiscale",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "main",
                "image": "registry/semiscale",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    },
}
# The Job controller, the controller that deletes the pods of a deleted Job, and the one that counts for the quota.
CONTROLLER_NAMES = ("job-controller", "garbage-collector-controller", "resourcequota-controller")
# Many shards, so that each pod gets one.
SHARDS, PER_SHARD = 12, 10
# A pod starts in seconds on a free machine.
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Run an API server with controllers and the manifests of a run's namespace."""
    if missing := [name for name in (*PROGRAMS, CONTROLLERS) if not find_program(name)]:
        pytest.skip(f"no {', '.join(missing)}: tests/apiserver/build.sh builds them")
    folder = tmp_path_factory.mktemp("api")
    with serve_api(folder) as server:
        for foreign_kind in FOREIGN_KINDS:
            server.check_kubectl("create", "-f", "-", stdin=build_definition(*foreign_kind))
        server.check_kubectl("wait", "--for", "condition=established", "crd", "--all", "--timeout", "60s")
        objects = build(MANIFESTS / "overlays" / "plain-s3", ("trainjobs",))
        # The namespace has to be there before its objects.
        objects.sort(key=lambda item: item["kind"] != "Namespace")
        with run_controllers(server, folder, *CONTROLLER_NAMES):
            for item in objects:
                server.check_kubectl("apply", "-f", "-", stdin=item)
            # The API server refuses pods until the quota has been counted.
            wait_until(lambda: server.request("GET", QUOTA).get("status", {}).get("used"))
            server.request("POST", PODS, FOLLOWER_POD)
            yield server


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a run with a trained teacher and no scores."""
    root = tmp_path_factory.mktemp("run")
    pool = sample_images.write_pool(root / "shards", SHARDS, PER_SHARD)
    stages = Stages(root, unlabeled=[str(pool)])
    assert stages.teacher
    return stages


class Scan:
    """A scan by a Job, from an empty score folder.

    Attributes:
        server: The API server.
        workdir: The workdir.
        run: Name of the run.
        kubelet: Runs the pods.
        hold: File that makes the pods wait.
        pod_env: Environment variables of the follower and of the pods.
        faults: Folder that says what happens to the pods.
        folder: The score folder.
    """

    def __init__(self, server: ApiServer, stages: Stages, root: Path) -> None:
        self.server, self._stages, self._root = server, stages, root
        self.faults = root / "faults"
        (self.faults / "started").mkdir(parents=True)
        self.hold = self.faults / "hold"
        self.workdir, self.run = stages.workdir, stages.config.name
        self._config = ScoreConfig(
            workdir=stages.workdir,
            plan=stages.uri(stages.plan),
            teacher=stages.uri(stages.teacher),
            count="",
            pod=0,
            images_per_class=stages.config.images_per_class,
        )
        self.folder = Path(score_folder(self._config, stages.plan, stages.teacher.digest))
        token = server.check_kubectl("create", "token", "semiscale", "-n", NAMESPACE).strip()
        self._env = {
            "KUBECONFIG": str(server.write_kubeconfig(token, NAMESPACE)),
            "NO_PROXY": "127.0.0.1",
            "KFP_POD_NAME": FOLLOWER,
        }
        self.pod_env = {
            "PYTHONPATH": str(FAULTS),
            "SCAN_FAULTS": str(self.faults),
            "FOLLOWER_TIMEOUT_S": "600",
            "SEMISCALE_LOG": "json",
            # The warnings of an unverified certificate would fill the log.
            "PYTHONWARNINGS": "ignore",
            # The pods share few cores.
            "OMP_NUM_THREADS": "1",
        }
        self.kubelet: Kubelet

    @contextmanager
    def follow(self, pods: int = 4, retries: int = 3) -> Iterator["subprocess.Popen[bytes]"]:
        """Run the stage that follows the Job, with the rights of its pod. It is killed at the end of the block."""
        machine = {"cpu": "1", "memory": "1Gi", "timeout_s": 3600, "retries": retries}
        launch = IndexedJobSettings.model_validate({"image": "registry/semiscale", "machine": machine})
        count = self._stages.unscored.model_copy(update={"pods": pods})
        config = self._config.model_copy(update={"count": self._stages.uri(count)})
        options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
        log = self._root / f"follower-{len(self.follower_logs())}.log"
        with (
            log.open("w") as output,
            subprocess.Popen(
                [sys.executable, "-m", "semiscale.stages.score", *options],
                env={**os.environ, **self._env, **self.pod_env, INDEXED_JOB_ENV: launch.model_dump_json()},
                stdout=output,
                stderr=output,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def finish(self, follower: "subprocess.Popen[bytes]") -> None:
        """Check that a follower ends with a receipt of the whole pool, and that its Job and the pods are gone."""
        assert self.exit_code(follower) == 0, self.output()
        wait_until(lambda: not self.jobs() and not self.pods())
        # The receipt is the only line of the log with this field.
        (line,) = [line for line in self.follower_logs()[-1].read_text().splitlines() if '"listed"' in line]
        receipt = ScoreReceipt.model_validate_json(line)
        assert (receipt.listed, receipt.scored, receipt.failed) == (SHARDS * PER_SHARD, SHARDS * PER_SHARD, {})

    def exit_code(self, follower: "subprocess.Popen[bytes]") -> int:
        """Return the exit code of a follower after its end."""
        return follower.wait(TIMEOUT_S)

    def follower_logs(self) -> list[Path]:
        """Return the logs of the followers in the order of their starts."""
        return sorted(self._root.glob("follower-*"))

    def output(self) -> str:
        """Return the logs of all followers and of the pods."""
        logs = [*self.follower_logs(), *(pod.log for pod in self.kubelet.pods())]
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs)

    def jobs(self) -> list[dict[str, Any]]:
        """Return the Jobs on the API server."""
        return list(self.server.request("GET", JOBS)["items"])

    def pods(self) -> list[dict[str, Any]]:
        """Return the pods of Jobs on the API server."""
        return list(self.server.request("GET", f"{PODS}?labelSelector=batch.kubernetes.io/job-name")["items"])

    def started(self) -> list[PodProcess]:
        """Return the pods that have ever held a shard."""
        names = {path.name for path in (self.faults / "started").iterdir()}
        return [pod for pod in self.kubelet.pods() if f"{pod.index}-{pod.process.pid}" in names]

    def wait_for_pods(self, count: int) -> list[PodProcess]:
        """Return the pods that have held a shard as soon as there are so many."""
        try:
            wait_until(lambda: len(self.started()) >= count)
        except AssertionError:
            raise AssertionError(self.output()) from None
        return self.started()

    def rows(self) -> dict[str, bytes]:
        """Return the files of ranked rows by their paths in the score folder."""
        return read_ranked(self.folder)


@pytest.fixture
def scan(server: ApiServer, stages: Stages, tmp_path: Path) -> Iterator[Scan]:
    """Return a scan whose pods wait as soon as they hold a shard, until the file `hold` is deleted."""
    scan = Scan(server, stages, tmp_path)
    shutil.rmtree(scan.folder, ignore_errors=True)
    scan.hold.touch()
    with run_kubelet(server, NAMESPACE, tmp_path, scan.pod_env) as kubelet:
        scan.kubelet = kubelet
        yield scan
        scan.hold.unlink(missing_ok=True)
        for job in scan.jobs():
            server.request("DELETE", f"{JOBS}/{job['metadata']['name']}?propagationPolicy=Foreground")
        kubelet.kill_all()
        wait_until(lambda: not scan.jobs() and not scan.pods())


@pytest.fixture(scope="module")
def expected(stages: Stages) -> dict[str, bytes]:
    """Return the files of ranked rows of a scan in one process."""
    receipt = stages.score(0)
    rows = read_ranked(Path(receipt.folder))
    assert rows
    return rows


def read_ranked(folder: Path) -> dict[str, bytes]:
    """Return the files of ranked rows by their paths in a score folder."""
    paths = [path for path in folder.rglob("*.parquet") if "parts" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, "the condition does not hold in time"
        time.sleep(0.2)


def test_the_pods_of_a_job_score_the_whole_pool(expected: dict[str, bytes], scan: Scan) -> None:
    with scan.follow() as follower:
        pods = scan.wait_for_pods(4)
        assert sorted(pod.index for pod in pods) == [0, 1, 2, 3]
        scan.hold.unlink()
        scan.finish(follower)
    assert [pod.process.returncode for pod in pods] == [0] * 4, scan.output()
    assert scan.rows() == expected


def test_a_killed_pod_is_replaced(expected: dict[str, bytes], scan: Scan) -> None:
    with scan.follow(pods=2) as follower:
        killed = scan.wait_for_pods(2)[0]
        killed.kill()
        wait_until(lambda: len(scan.kubelet.pods()) == 3)
        assert scan.kubelet.pods()[2].index == killed.index
        scan.wait_for_pods(3)
        scan.hold.unlink()
        scan.finish(follower)
    assert scan.rows() == expected


def test_a_refusal_ends_the_job_at_once(scan: Scan) -> None:
    (scan.faults / "fail-1").write_text("2")
    with scan.follow() as follower:
        assert scan.exit_code(follower) == 2, scan.output()
    (job,) = scan.jobs()
    (failed,) = [item for item in job["status"]["conditions"] if item["type"] == "Failed"]
    assert failed["reason"] == "PodFailurePolicy"
    (refused,) = [pod for pod in scan.kubelet.pods() if pod.index == 1]
    log = scan.follower_logs()[-1].read_text()
    assert f"({refused.name}, exit code 2)" in log
    assert "SEMI-E270" in log


def test_an_evicted_pod_is_replaced_without_retries(expected: dict[str, bytes], scan: Scan) -> None:
    with scan.follow(pods=2, retries=0) as follower:
        evicted = scan.wait_for_pods(2)[0]
        # The API for evictions does the same.
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        path = f"{PODS}/{evicted.name}"
        status = {"status": {"conditions": [condition]}}
        scan.server.request("PATCH", f"{path}/status", status, "application/strategic-merge-patch+json")
        scan.server.request("DELETE", path)
        scan.wait_for_pods(3)
        assert evicted.process.wait() == 143, "the pod has released its leases"
        assert scan.kubelet.pods()[2].index == evicted.index
        assert scan.jobs()[0]["status"]["failedIndexes"] == ""
        scan.hold.unlink()
        scan.finish(follower)
    assert scan.rows() == expected


def test_the_other_pods_finish_the_work_of_one_that_failed_for_good(expected: dict[str, bytes], scan: Scan) -> None:
    (scan.faults / "fail-0").write_text("1")
    with scan.follow(pods=3, retries=0) as follower:
        scan.wait_for_pods(3)
        wait_until(lambda: scan.jobs()[0]["status"].get("failedIndexes") == "0")
        scan.hold.unlink()
        scan.finish(follower)
    assert len(scan.kubelet.pods()) == 3
    assert scan.rows() == expected


def test_the_number_of_pods_can_be_changed_while_a_job_runs(expected: dict[str, bytes], scan: Scan) -> None:
    with scan.follow(pods=2) as follower:
        scan.wait_for_pods(2)
        name = scan.jobs()[0]["metadata"]["name"]
        patch = json.dumps({"spec": {"completions": 4, "parallelism": 4}})
        scan.server.check_kubectl("patch", "job", name, "-n", NAMESPACE, "--patch", patch)
        assert sorted(pod.index for pod in scan.wait_for_pods(4)) == [0, 1, 2, 3]
        assert scan.jobs()[0]["spec"]["completions"] == 4
        scan.hold.unlink()
        scan.finish(follower)
    assert scan.rows() == expected


def test_a_follower_that_was_killed_finds_its_job_again(expected: dict[str, bytes], scan: Scan) -> None:
    with scan.follow(pods=2):
        scan.wait_for_pods(2)
        (job,) = scan.jobs()
    with scan.follow(pods=2) as follower:
        wait_until(lambda: "found, it goes on" in scan.follower_logs()[1].read_text())
        assert [item["metadata"]["uid"] for item in scan.jobs()] == [job["metadata"]["uid"]]
        scan.hold.unlink()
        scan.finish(follower)
    assert len(scan.kubelet.pods()) == 2
    assert scan.rows() == expected


def test_the_pods_of_a_cancelled_run_end_their_job(scan: Scan) -> None:
    with scan.follow(pods=2) as follower:
        pods = scan.wait_for_pods(2)
        announce_cancellation(scan.workdir, scan.run)
        assert scan.exit_code(follower) == 4, scan.output()
    check_abandoned(scan, pods)


def test_pods_that_nobody_follows_end_their_job(scan: Scan) -> None:
    scan.pod_env["FOLLOWER_TIMEOUT_S"] = "20"
    with scan.follow(pods=2):
        pods = scan.wait_for_pods(2)
    wait_until(lambda: end_condition(scan.jobs()[0]))
    check_abandoned(scan, pods)


def check_abandoned(scan: Scan, pods: list[PodProcess]) -> None:
    """Check that the Job of two pods has failed because they were abandoned, and that no pod was replaced."""
    end = end_condition(scan.jobs()[0])
    assert end
    assert (end["type"], end["reason"]) == ("Failed", "PodFailurePolicy")
    # The Job stops the pods that have not ended by themselves.
    assert 4 in [pod.process.wait(TIMEOUT_S) for pod in pods]
    assert {pod.process.returncode for pod in pods} <= {4, 143}
    assert len(scan.kubelet.pods()) == len(pods)
