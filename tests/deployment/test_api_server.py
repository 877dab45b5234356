"""Test manifests, pods and permissions against a Kubernetes API server."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from semiscale import storage
from semiscale.config.resources import APP_LABELS, TRAINJOB_ENV
from semiscale.stages.train.config import TrainConfig
from tests.deployment.test_manifests import (
    COMPILED,
    COMPONENTS,
    MANIFESTS,
    OVERLAYS,
    PODS,
    SECURITY_OF_KUBEFLOW,
    overlay,
    stage_pods,
)
from tests.stages.train.test_trainjob import LAUNCHED, command, config, leave_receipt
from tests.support.api_server import PROGRAMS, ApiServer, find_program, serve_api

# pytest finds this fixture by its name.
__all__ = ["config"]

pytestmark = pytest.mark.slow

# Kinds of other projects, with group, version, and whether they are in a namespace. test_manifests.py checks their
# content against their own schemas.
FOREIGN_KINDS = [
    ("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime", True),
    ("trainer.kubeflow.org", "v1alpha1", "TrainJob", True),
    ("kueue.x-k8s.io", "v1beta2", "ResourceFlavor", False),
    ("kueue.x-k8s.io", "v1beta2", "ClusterQueue", False),
    ("kueue.x-k8s.io", "v1beta2", "WorkloadPriorityClass", False),
    ("kueue.x-k8s.io", "v1beta2", "LocalQueue", True),
    ("monitoring.coreos.com", "v1", "PodMonitor", True),
    ("argoproj.io", "v1alpha1", "WorkflowTaskResult", True),
]
RUN = "system:serviceaccount:semiscale:semiscale"
# Labels of the pod of a stage. Argo sets the second one.
RUN_LABELS = {**APP_LABELS, "workflows.argoproj.io/workflow": "semiscale-1"}
STOP_COMMAND = ["python3", "-m", "semiscale.runtime.stop_stage"]
# The rights of a run's pods in their namespace, by the rules of manifests/.
ALLOWED = [
    ("create", "workflowtaskresults.argoproj.io"),
    ("patch", "workflowtaskresults.argoproj.io"),
    ("get", "configmaps/kfp-launcher"),
    ("get", "secrets/mlpipeline-minio-artifact"),
    *[(verb, "trainjobs.trainer.kubeflow.org") for verb in ("create", "get", "watch", "delete")],
    ("list", "pods"),
    ("get", "pods/log"),
]
FORBIDDEN = [
    ("list", "secrets"),
    ("get", "secrets"),
    ("get", "configmaps"),
    ("create", "pods"),
    ("get", "pods"),
    ("delete", "pods"),
    ("list", "trainjobs.trainer.kubeflow.org"),
    ("create", "pods/exec"),
    ("create", "serviceaccounts/token"),
    ("create", "rolebindings"),
    ("impersonate", "serviceaccounts"),
    ("update", "trainjobs.trainer.kubeflow.org"),
    ("create", "trainingruntimes.trainer.kubeflow.org"),
    ("get", "nodes"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Run an API server with the kinds of other projects."""
    if missing := [name for name in PROGRAMS if not find_program(name)]:
        pytest.skip(f"no {', '.join(missing)}: tests/apiserver/build.sh builds them")
    folder = tmp_path_factory.mktemp("api")
    with serve_api(folder) as server:
        for foreign_kind in FOREIGN_KINDS:
            server.check_kubectl("create", "-f", "-", stdin=build_definition(*foreign_kind))
        server.check_kubectl("wait", "--for", "condition=established", "crd", "--all", "--timeout", "60s")
        yield server


@pytest.fixture(scope="module")
def applied(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """Apply every overlay with and without Kubeflow's profiles (docs/kubeflow.md).

    Each overlay replaces the one before it, as if a cluster had changed its store.
    """
    server.check_kubectl("create", "namespace", "kubeflow")
    clone = tmp_path_factory.mktemp("clone") / "manifests"
    shutil.copytree(MANIFESTS, clone)
    for number, name in enumerate(OVERLAYS * 2):
        path = clone / "overlays" / name / "kustomization.yaml"
        content = yaml.safe_load(path.read_text())
        # The last component is standalone.
        components = COMPONENTS if number < len(OVERLAYS) else COMPONENTS[:-1]
        content["components"] = [f"../../components/{component}" for component in components]
        path.write_text(yaml.safe_dump(content))
        server.check_kubectl("apply", "--validate=strict", "-k", str(path.parent))
    return server


def build_definition(group: str, version: str, kind: str, namespaced: bool) -> dict[str, Any]:
    """Return the definition of a kind with any content and a status subresource."""
    plural = f"{kind.lower()}es" if kind.endswith("s") else f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            # Kubernetes requires it for names in k8s.io.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": group,
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced" if namespaced else "Cluster",
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def test_overlays_are_applied_without_a_warning_and_again(applied: ApiServer) -> None:
    again = applied.check_kubectl(
        "apply", "--dry-run=server", "-k", str(MANIFESTS / "overlays" / OVERLAYS[-1])
    ).splitlines()
    assert len(again) == len(overlay(OVERLAYS[-1]))
    assert [line for line in again if not line.endswith("unchanged (server dry run)")] == []


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_the_namespace_admits_only_pods_with_the_settings_of_kubeflow(applied: ApiServer, compiled: Path) -> None:
    for stage, pod in stage_pods(compiled, SECURITY_OF_KUBEFLOW).items():
        admitted = applied.check_kubectl(
            "create", "--dry-run=server", "-f", "-", "-o", "json", stdin=as_pod(stage, pod)
        )
        # The namespace sets default limits.
        assert json.loads(admitted)["spec"]["containers"][0]["resources"]["limits"]
    for stage, pod in stage_pods(compiled, {}).items():
        refused = applied.kubectl("create", "--dry-run=server", "-f", "-", stdin=as_pod(stage, pod))
        assert refused.returncode == 1
        assert 'violates PodSecurity "restricted' in refused.stderr


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_the_pods_of_stages_stop_gracefully(applied: ApiServer, compiled: Path) -> None:
    for stage, pod in stage_pods(compiled, SECURITY_OF_KUBEFLOW).items():
        # Argo's container stands first, as in a cluster. The namespace admits only pods that are restricted.
        container = {"name": "wait", "securityContext": pod["containers"][0]["securityContext"]}
        admitted = admit(applied, as_pod(stage, {**pod, "containers": [container, *pod["containers"]]}), RUN_LABELS)
        lifecycles = {container["name"]: container.get("lifecycle") for container in admitted["containers"]}
        assert lifecycles == {"wait": None, "main": {"preStop": {"exec": {"command": STOP_COMMAND}}}}
        assert admitted["terminationGracePeriodSeconds"] == 120


def test_other_pods_and_longer_grace_periods_are_unchanged(applied: ApiServer) -> None:
    pod = stage_pods(COMPILED[0], SECURITY_OF_KUBEFLOW)["exec-train"]
    for label in RUN_LABELS:
        admitted = admit(applied, as_pod("other", pod), {label: RUN_LABELS[label]})
        assert "lifecycle" not in admitted["containers"][0]
        assert admitted["terminationGracePeriodSeconds"] == 30
    admitted = admit(applied, as_pod("long", {**pod, "terminationGracePeriodSeconds": 300}), RUN_LABELS)
    assert admitted["terminationGracePeriodSeconds"] == 300
    assert admitted["containers"][0]["lifecycle"]


def admit(server: ApiServer, pod: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """Return the spec of a pod with labels as the API server would store it."""
    pod["metadata"]["labels"] = labels
    answer = server.check_kubectl("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=pod)
    spec: dict[str, Any] = json.loads(answer)["spec"]
    return spec


@pytest.mark.parametrize("node", PODS)
def test_the_namespace_admits_a_trainings_nodes(applied: ApiServer, node: dict[str, Any]) -> None:
    admitted = json.loads(
        applied.check_kubectl("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=as_pod("node", node))
    )
    assert admitted["spec"]["priority"] == 1000
    assert admitted["spec"]["serviceAccountName"] == "semiscale-training"
    # The pod has no token for this API.
    assert [volume for volume in admitted["spec"]["volumes"] if "projected" in volume] == []


def as_pod(stage: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod of a run, with an image and the service account of a stage."""
    containers = [{**container, "image": "registry/semiscale"} for container in pod["containers"]]
    spec = {"serviceAccountName": "semiscale", **pod, "containers": containers}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": stage, "namespace": "semiscale"}, "spec": spec}


def test_a_run_has_the_rights_it_needs_and_no_others(applied: ApiServer) -> None:
    def is_allowed(verb: str, resource: str, namespace: str) -> bool:
        answer = applied.kubectl("auth", "can-i", verb, *kubectl_names(resource), "-n", namespace, "--as", RUN)
        assert answer.stdout.strip() in ("yes", "no"), answer.stderr
        return answer.stdout.strip() == "yes"

    assert [right for right in ALLOWED if not is_allowed(*right, "semiscale")] == []
    assert [right for right in FORBIDDEN if is_allowed(*right, "semiscale")] == []
    assert [right for right in ALLOWED if is_allowed(*right, "default")] == []
    node = ["auth", "can-i", "--list", "-n", "semiscale", "--as", f"{RUN}-training"]
    assert "trainer.kubeflow.org" not in applied.check_kubectl(*node)


def kubectl_names(resource: str) -> list[str]:
    """Return the arguments of kubectl for a resource.

    A subresource is an option. The name of an object stands after a slash.
    """
    kind, _, name = resource.partition("/")
    return [kind, "--subresource", name] if kind in ("pods", "serviceaccounts") and name else [resource]


def test_a_stage_follows_a_trainjob_with_the_rights_of_its_pod(
    applied: ApiServer, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = applied.check_kubectl("create", "token", "semiscale", "-n", "semiscale").strip()
    monkeypatch.setenv("KUBECONFIG", str(applied.write_kubeconfig(token, "semiscale")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    job = ["trainjob", f"semiscale-{config.digest()}", "-n", "semiscale"]
    with subprocess.Popen(command(config), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as stage:
        try:
            applied.check_kubectl("wait", "--for", "create", *job, "--timeout", "60s")
            leave_receipt(config)
            status = {
                "status": {"conditions": [{"type": "Complete", "status": "True", "message": "", "reason": "Done"}]}
            }
            applied.check_kubectl("patch", *job, "--subresource", "status", "--type", "merge", "-p", json.dumps(status))
            out, error = stage.communicate(timeout=120)
        finally:
            stage.kill()
    assert stage.returncode == 0, error
    assert "is complete" in out + error
    # The TrainJob stays until the garbage collector has deleted its pods.
    deleted = json.loads(applied.check_kubectl("get", *job, "-o", "json"))
    assert deleted["metadata"]["deletionTimestamp"]
    assert deleted["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert storage.head(storage.join(config.folder(), "receipt.json"))


def test_without_the_component_a_training_on_nodes_is_refused(
    server: ApiServer, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.check_kubectl("create", "serviceaccount", "stranger", "-n", "default")
    token = server.check_kubectl("create", "token", "stranger", "-n", "default").strip()
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(token, "default")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    completed = subprocess.run(command(config), capture_output=True, text=True, timeout=120)
    assert completed.returncode == 2, completed.stderr
    assert "SEMI-E261" in completed.stderr + completed.stdout
    assert "See manifests/components/trainjobs" in completed.stderr + completed.stdout
