"""Test the Job of a scan or a packing, and the choice between a loop and a Job."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest

from semiscale import storage
from semiscale.config.resources import FAN_OUT_ENV, MAX_LOOP_PODS, IndexedJobSettings
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.runtime import indexed_job
from semiscale.runtime.pod_count import choose_pod_count, loop_items
from semiscale.stages.score.config import ScoreConfig
from tests.deployment.test_manifests import KUBERNETES

MACHINE = {
    "cpu": "16",
    "memory": "48Gi",
    "gpus": 2,
    "shared_memory": "8Gi",
    "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    "tolerations": [{"key": "nvidia.com/gpu"}],
    "timeout_s": 7200,
    "retries": 7,
}
LAUNCHED = IndexedJobSettings.model_validate(
    {"image": "r/cuda@sha256:0", "machine": MACHINE, "queue": "gpus", "priority": "low", "secret": "s3"}
)
FOLLOWER = SimpleNamespace(
    spec=SimpleNamespace(service_account_name="runs", image_pull_secrets=[SimpleNamespace(name="registry")])
)


@pytest.fixture
def config(tmp_path: Path) -> ScoreConfig:
    """Return a scan whose receipts are copies, which is how kfp passes them."""
    for name in ("plan", "teacher", "count"):
        content = {"digest": name, "folder": str(tmp_path / "work" / "stages" / name)}
        storage.write_bytes(str(tmp_path / "copies" / name), json.dumps(content).encode())
    copies = {name: str(tmp_path / "copies" / name) for name in ("plan", "teacher", "count")}
    return ScoreConfig(workdir=str(tmp_path / "work"), pod=0, images_per_class=5, image_column="a$(b)", **copies)


def build(config: ScoreConfig, launch: IndexedJobSettings = LAUNCHED) -> dict[str, Any]:
    return indexed_job.build_job(config, "semiscale-score-0", f"{config.workdir}/count.json", 64, launch, FOLLOWER)


@pytest.mark.parametrize("launch", [LAUNCHED, IndexedJobSettings(image="i", machine=LAUNCHED.machine.model_copy(
    update={"gpus": 0, "shared_memory": "", "tolerations": [], "node_selector": {}}
))])  # fmt: skip
def test_the_job_passes_the_strict_schema(config: ScoreConfig, launch: IndexedJobSettings) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(build(config, launch), version, strict=True)


def test_the_job_has_the_hardware_and_the_options_of_the_stage(config: ScoreConfig, tmp_path: Path) -> None:
    job = build(config)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 64, 64)
    assert spec["backoffLimitPerIndex"] == 7
    assert spec["podReplacementPolicy"] == "Failed"
    disruption, ending = spec["podFailurePolicy"]["rules"]
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (ending["action"], ending["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4])
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/job-min-parallelism": "1"}

    assert (pod["serviceAccountName"], pod["imagePullSecrets"]) == ("runs", [{"name": "registry"}])
    assert pod["automountServiceAccountToken"] is False, "the pods ask nothing of the cluster"
    assert (pod["restartPolicy"], pod["activeDeadlineSeconds"]) == ("Never", 7200)
    assert pod["nodeSelector"] == MACHINE["node_selector"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert container["resources"]["limits"] == {"cpu": "16", "memory": "48Gi", "nvidia.com/gpu": "2"}
    secret = [variable for variable in container["env"] if "valueFrom" in variable]
    assert {variable["valueFrom"]["secretKeyRef"]["name"] for variable in secret} == {"s3"}

    assert container["command"] == ["python", "-m", "semiscale.stages.score"]
    options = dict(option.removeprefix("--").split("=", 1) for option in container["args"])
    assert set(options) == {name.replace("_", "-") for name in ScoreConfig.model_fields}
    assert options["pod"] == "$(JOB_COMPLETION_INDEX)"
    assert options["image-column"] == "a$$(b)", "Kubernetes expands nothing else"
    assert options["plan"] == f"{tmp_path}/work/stages/plan/receipt.json"
    assert "copies" not in json.dumps(job), "a pod has no copy of a receipt"


def test_everybody_who_works_in_a_folder_names_the_same_job(config: ScoreConfig) -> None:
    other_pod = config.model_copy(update={"pod": 3, "images_per_class": 9})
    assert indexed_job.job_name(config, "gs://b/f") == indexed_job.job_name(other_pod, "gs://b/f")
    assert indexed_job.job_name(config, "gs://b/f") != indexed_job.job_name(config, "gs://b/g")


@pytest.mark.parametrize(
    ("fan_out", "pods", "items"), [("", 200, 200), ("loop", MAX_LOOP_PODS, MAX_LOOP_PODS), ("job", 200, 1)]
)
def test_a_loop_has_at_most_the_pods_that_a_workflow_holds(
    config: ScoreConfig, fan_out: str, pods: int, items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fan_out:
        monkeypatch.setenv(FAN_OUT_ENV, fan_out)
    receipt: FanoutReceipt = choose_pod_count(config, 200, "folder", lambda: (500, "500 of 500 shards to score"))
    assert receipt.pods == pods
    assert ("compiled for loops" in receipt.why) == (fan_out == "loop")
    assert loop_items(receipt) == list(range(items))
