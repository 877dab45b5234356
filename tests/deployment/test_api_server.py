"""Test manifests, pods of the stages and permissions against a Kubernetes API server."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from semiscale import storage
from semiscale.config.resources import TRAINJOB_ENV
from semiscale.stages.train.config import TrainConfig
from tests.deployment.test_manifests import (
    COMPILED,
    COMPONENTS,
    KUBEFLOWS,
    MANIFESTS,
    OVERLAYS,
    PODS,
    overlay,
    stage_pods,
)
from tests.stages.train.test_trainjob import LAUNCHED, command, config, leave_receipt
from tests.support.api_server import PROGRAMS, ApiServer, find_program, serve_api

__all__ = ["config"]  # a fixture

pytestmark = pytest.mark.slow

# The kinds that other projects bring: group, version, kind, and whether they lie in a namespace. What is in them is
# checked against their own schemas in test_manifests.py.
BROUGHT = [
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
# What a run's pods may do in their namespace: the rules of manifests/, and what Kubernetes lets everyone ask of itself.
MAY = [
    ("create", "workflowtaskresults.argoproj.io"),
    ("patch", "workflowtaskresults.argoproj.io"),
    ("get", "configmaps/kfp-launcher"),
    ("get", "secrets/mlpipeline-minio-artifact"),
    *[(verb, "trainjobs.trainer.kubeflow.org") for verb in ("create", "get", "watch", "delete")],
    ("list", "pods"),
    ("get", "pods/log"),
]
MAY_NOT = [
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
    """An API server that knows the kinds of Kubeflow Trainer, Kueue and the Prometheus Operator, and both overlays with
    all that goes with them.

    The second stands in the place of the first, as if a cluster had changed its store.
    """
    if missing := [name for name in PROGRAMS if not find_program(name)]:
        pytest.skip(f"no {', '.join(missing)}: tests/apiserver/build.sh builds them")
    folder = tmp_path_factory.mktemp("api")
    with serve_api(folder) as server:
        for brought in BROUGHT:
            server.done("create", "-f", "-", stdin=definition(*brought))
        server.done("wait", "--for", "condition=established", "crd", "--all", "--timeout", "60s")
        yield server


@pytest.fixture(scope="module")
def applied(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """The server with every overlay applied, with and without Kubeflow's profiles, as docs/kubeflow.md says."""
    server.done("create", "namespace", "kubeflow")
    clone = tmp_path_factory.mktemp("clone") / "manifests"
    shutil.copytree(MANIFESTS, clone)
    for number, name in enumerate(OVERLAYS * 2):
        added = clone / "overlays" / name / "kustomization.yaml"
        content = yaml.safe_load(added.read_text())
        components = COMPONENTS if number < len(OVERLAYS) else COMPONENTS[:-1]  # the last is standalone
        content["components"] = [f"../../components/{one}" for one in components]
        added.write_text(yaml.safe_dump(content))
        server.done("apply", "--validate=strict", "-k", str(added.parent))
    return server


def definition(group: str, version: str, kind: str, namespaced: bool) -> dict[str, Any]:
    """Return the definition of a kind, of any content, whose status is of its controller's only."""
    plural = f"{kind.lower()}es" if kind.endswith("s") else f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},  # asked for of names in k8s.io
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
    again = applied.done("apply", "--dry-run=server", "-k", str(MANIFESTS / "overlays" / OVERLAYS[-1])).splitlines()
    assert len(again) == len(overlay(OVERLAYS[-1]))
    assert [line for line in again if not line.endswith("unchanged (server dry run)")] == []


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_the_namespace_admits_the_stages_pods_and_no_less(applied: ApiServer, compiled: Path) -> None:
    for stage, pod in stage_pods(compiled, KUBEFLOWS).items():
        admitted = applied.done("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=as_pod(stage, pod))
        assert json.loads(admitted)["spec"]["containers"][0]["resources"]["limits"]  # the namespace's own, by default
    for stage, pod in stage_pods(compiled, {}).items():
        refused = applied.kubectl("create", "--dry-run=server", "-f", "-", stdin=as_pod(stage, pod))
        assert refused.returncode == 1
        assert 'violates PodSecurity "restricted' in refused.stderr


@pytest.mark.parametrize("node", PODS)
def test_the_namespace_admits_a_trainings_nodes(applied: ApiServer, node: dict[str, Any]) -> None:
    admitted = json.loads(
        applied.done("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=as_pod("node", node))
    )
    assert admitted["spec"]["priority"] == 1000
    assert admitted["spec"]["serviceAccountName"] == "semiscale-training"
    assert [one for one in admitted["spec"]["volumes"] if "projected" in one] == []  # no token for this API


def as_pod(stage: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod of a run: its image, and a stage's account, come with the run."""
    containers = [{**one, "image": "registry/semiscale"} for one in pod["containers"]]
    spec = {"serviceAccountName": "semiscale", **pod, "containers": containers}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": stage, "namespace": "semiscale"}, "spec": spec}


def test_a_run_may_do_what_it_does_and_no_more(applied: ApiServer) -> None:
    def may(verb: str, resource: str, namespace: str) -> bool:
        answer = applied.kubectl("auth", "can-i", verb, *named(resource), "-n", namespace, "--as", RUN)
        assert answer.stdout.strip() in ("yes", "no"), answer.stderr
        return answer.stdout.strip() == "yes"

    assert [one for one in MAY if not may(*one, "semiscale")] == []
    assert [one for one in MAY_NOT if may(*one, "semiscale")] == []
    assert [one for one in MAY if may(*one, "default")] == []
    node = ["auth", "can-i", "--list", "-n", "semiscale", "--as", f"{RUN}-training"]
    assert "trainer.kubeflow.org" not in applied.done(*node)


def named(resource: str) -> list[str]:
    """Spell a resource as kubectl does: a subresource is an option, an object's name comes after a slash."""
    kind, _, name = resource.partition("/")
    return [kind, "--subresource", name] if kind in ("pods", "serviceaccounts") and name else [resource]


def test_a_stage_follows_a_trainjob_with_the_rights_of_its_pod(
    applied: ApiServer, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = applied.done("create", "token", "semiscale", "-n", "semiscale").strip()
    monkeypatch.setenv("KUBECONFIG", str(applied.kubeconfig_of(token, "semiscale")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    job = ["trainjob", f"semiscale-{config.digest()}", "-n", "semiscale"]
    with subprocess.Popen(command(config), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as stage:
        try:
            applied.done("wait", "--for", "create", *job, "--timeout", "60s")
            leave_receipt(config)
            status = {
                "status": {"conditions": [{"type": "Complete", "status": "True", "message": "", "reason": "Done"}]}
            }
            applied.done("patch", *job, "--subresource", "status", "--type", "merge", "-p", json.dumps(status))
            out, error = stage.communicate(timeout=120)
        finally:
            stage.kill()
    assert stage.returncode == 0, error
    assert "is complete" in out + error
    left = json.loads(applied.done("get", *job, "-o", "json"))  # until the garbage collector has seen to its pods
    assert left["metadata"]["deletionTimestamp"]
    assert left["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert storage.head(storage.join(config.folder(), "receipt.json"))


def test_without_the_component_a_training_on_nodes_is_refused_with_one_line(
    server: ApiServer, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.done("create", "serviceaccount", "stranger", "-n", "default")
    token = server.done("create", "token", "stranger", "-n", "default").strip()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of(token, "default")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TRAINJOB_ENV, LAUNCHED.model_dump_json())
    ended = subprocess.run(command(config), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "SEMI-E261" in ended.stderr + ended.stdout
    assert "See manifests/components/trainjobs" in ended.stderr + ended.stdout
