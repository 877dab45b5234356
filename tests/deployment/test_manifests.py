"""Test the manifests of every overlay: strict schemas, pod security, least privilege, no credentials."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from components.placement import APP_LABELS
from semiscale.config.resources import METRICS_PORT, PROMETHEUS_ANNOTATIONS, TrainingPodResources
from tests.support.kustomize import Object, build

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
KUBERNETES = ("1.30", "1.37")  # the oldest that we say, and the newest that the schemas know
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
NAMESPACED = (
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "ResourceQuota",
    "NetworkPolicy",
    "TrainingRuntime",
    "LocalQueue",
    "PodMonitor",
)
# Kinds of pods and what holds a pod's template, by the path to it.
POD_TEMPLATES = {
    "TrainingRuntime": lambda one: [
        job["template"]["spec"]["template"] for job in one["spec"]["template"]["spec"]["replicatedJobs"]
    ]
}


COMPONENTS = ("trainjobs", "kueue", "prometheus-operator", "standalone")  # in the order in which an overlay names them


@functools.cache
def overlay(name: str, *components: str) -> tuple[Object, ...]:
    """Return the objects of an overlay with components added to it."""
    return tuple(build(MANIFESTS / "overlays" / name, components))


# None, each alone, all, and all on a cluster with Kubeflow's profiles.
CHOICES = ((), *((one,) for one in COMPONENTS), COMPONENTS, COMPONENTS[:-1])
CASES = [(name, *chosen) for name in OVERLAYS for chosen in CHOICES]
OBJECTS = {
    json.dumps(one): pytest.param(one, id="-".join([*case, one["kind"], one["metadata"]["name"]]))
    for case in CASES
    for one in overlay(*case)
}.values()
PODS = [
    pytest.param(template["spec"], id=f"{name}-{one['metadata']['name']}")
    for name in OVERLAYS
    for one in overlay(name, "trainjobs")
    if one["kind"] in POD_TEMPLATES
    for template in POD_TEMPLATES[one["kind"]](one)
]


def validate(one: Object) -> None:
    """Check an object against its kind's schema, which knows every field. Raises ValidationError."""
    group, _, version = one["apiVersion"].rpartition("/")
    path = SCHEMAS / f"{group}_{version}_{one['kind']}.json"
    if path.exists():
        jsonschema.Draft202012Validator(json.loads(path.read_text())).validate(one)
        return
    for kubernetes in KUBERNETES:
        kubernetes_validate.validate(one, kubernetes, strict=True)


@pytest.mark.parametrize("one", OBJECTS)
def test_every_object_passes_its_strict_schema(one: Object) -> None:
    validate(one)


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    for one in overlay("gke", *COMPONENTS[:-1]):
        spec = next(name for name in ("spec", "rules", "metadata", "value") if name in one)
        with pytest.raises(jsonschema.ValidationError):
            validate({**one, "surplus": {}, spec: one[spec]})


def test_the_build_is_kustomizes(tmp_path: Path) -> None:
    kustomize = shutil.which("kustomize") or shutil.which("kustomize", path=str(Path.home() / "go" / "bin"))
    if not kustomize:
        pytest.skip("no kustomize: go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.1")
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    for name, *components in CASES:
        folder = tmp_path / "manifests" / "overlays" / f"{name}-{'-'.join(components)}"
        shutil.copytree(MANIFESTS / "overlays" / name, folder)
        if components:
            command = [kustomize, "edit", "add", "component", *(f"../../components/{one}" for one in components)]
            subprocess.run(command, cwd=folder, check=True)
        done = subprocess.run([kustomize, "build", str(folder)], capture_output=True, text=True, check=True)
        theirs = [one for one in yaml.safe_load_all(done.stdout) if one]
        assert sorted(map(key, theirs)) == sorted(map(key, overlay(name, *components)))
        for one in theirs:
            assert one == next(mine for mine in overlay(name, *components) if key(mine) == key(one))


def key(one: Object) -> tuple[str, str]:
    """Return what tells an object from the others."""
    return one["kind"], one["metadata"]["name"]


@pytest.mark.parametrize("pod", PODS)
def test_pods_meet_the_security_level_restricted(pod: Object) -> None:
    assert violations(pod) == []


# What Kubeflow Pipelines 2.17 says of every stage's container by itself:
# https://github.com/kubeflow/pipelines/blob/2.17.0/backend/src/v2/compiler/argocompiler/security_context.go
KUBEFLOWS = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
COMPILED = [MANIFESTS / "pipeline.yaml", *sorted((MANIFESTS / "compiled").glob("*.yaml"))]


def stage_pods(compiled: Path, kubeflows: Object) -> dict[str, Object]:
    """Return the pods of a compiled pipeline's stages, as far as it says what they are, and `kubeflows` part."""
    (_, platform) = yaml.safe_load_all(compiled.read_text())
    pods = {}
    for stage, executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        # As strings, in protobuf's JSON.
        own = {
            name: value if isinstance(value, bool) else int(value)
            for name, value in executor["securityContext"].items()
        }
        mounts = executor.get("emptyDirMounts", [])
        volumes = [{"name": one["volumeName"], "emptyDir": {"sizeLimit": one["sizeLimit"]}} for one in mounts]
        pods[stage] = {"containers": [{"name": "main", "securityContext": {**kubeflows, **own}}], "volumes": volumes}
    return pods


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_a_stages_pod_meets_restricted_with_what_kubeflow_adds_and_no_less(compiled: Path) -> None:
    whole, ours = stage_pods(compiled, KUBEFLOWS), stage_pods(compiled, {})
    assert len(whole) == 14
    assert {stage: violations(pod) for stage, pod in whole.items()} == {stage: [] for stage in whole}
    missing = ["main: allowPrivilegeEscalation", "main: capabilities", "main: seccompProfile"]
    assert {stage: violations(pod) for stage, pod in ours.items()} == dict.fromkeys(ours, missing)
    security_page = (ROOT / "SECURITY.md").read_text()
    assert [name for name in KUBEFLOWS if f"`{name}" not in security_page] == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v: hostPath"),
        ({"securityContext": {}}, "node: runAsNonRoot"),
        ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, "node: seccompProfile"),
        ({"containers": [{"name": "node", "securityContext": {"privileged": True}}]}, "node: privileged"),
    ],
)
def test_the_rules_of_restricted_find_what_breaks_them(change: Object, rule: str) -> None:
    assert rule in violations({**PODS[0].values[0], **change})  # type: ignore[dict-item]


def violations(pod: Object) -> list[str]:
    """Return which rules a pod breaks. https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in pod.get("volumes", []):
        found += [f"volume {volume['name']}: {kind}" for kind in volume.keys() - {"name"} - allowed]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        found += [f"{container['name']}: {rule}" for rule in _broken(container, pod.get("securityContext", {}))]
    return found


def _broken(container: Object, pod: Object) -> list[str]:
    own: Object = container.get("securityContext", {})
    both = {**pod, **own}
    capabilities = own.get("capabilities", {})
    rules = {
        "privileged": not own.get("privileged"),
        "hostPorts": not any(port.get("hostPort") for port in container.get("ports", [])),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": "ALL" in capabilities.get("drop", [])
        and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot": both.get("runAsNonRoot") is True,
        "runAsUser": both.get("runAsUser") != 0,
        "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "procMount": own.get("procMount", "Default") == "Default",
        "sysctls": not pod.get("sysctls"),
    }
    return [rule for rule, kept in rules.items() if not kept]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_it_and_is_left_alone_where_it_is_not_ours(name: str) -> None:
    (namespace,) = [one for one in overlay(name) if one["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    # Nothing that would take hold of the pods of Kubeflow Pipelines itself.
    whole = {"Namespace", "ResourceQuota", "LimitRange"}
    assert whole <= {one["kind"] for one in overlay(name)}
    assert not [one["kind"] for one in overlay(name, "standalone") if one["kind"] in whole]
    for one in overlay(name, "standalone"):
        assert one["kind"] != "NetworkPolicy" or one["spec"]["podSelector"].get("matchLabels")
    for case in CASES:
        expected = "kubeflow" if "standalone" in case else "semiscale"
        namespaced = [one for one in overlay(*case) if one["kind"] in NAMESPACED]
        assert {one["metadata"]["namespace"] for one in namespaced} == {expected}
        bindings = [one for one in namespaced if one["kind"] == "RoleBinding"]
        assert {one["subjects"][0]["namespace"] for one in bindings} == {expected}


@pytest.mark.parametrize("name", OVERLAYS)
def test_roles_name_what_they_allow(name: str) -> None:
    roles = [one for one in overlay(name, *COMPONENTS) if one["kind"] in ("Role", "ClusterRole")]
    assert [key(one) for one in roles] == [("Role", "semiscale"), ("Role", "semiscale-trainjobs")]
    for rule in [rule for one in roles for rule in one["rules"]]:
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "secrets" not in rule["resources"] or rule.get("resourceNames")


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_with_trainings_on_many_nodes_may_a_run_make_pods(name: str) -> None:
    """Whoever makes a TrainJob, a pod or a job makes a pod with any service account and Secret of the namespace."""
    for components in ([], ["kueue", "standalone"]):
        for rule in [rule for one in overlay(name, *components) if one["kind"] == "Role" for rule in one["rules"]]:
            assert rule["resources"][0] in ("workflowtaskresults", "configmaps", "secrets")
            assert set(rule["verbs"]) <= {"get", "create", "patch"}
    (trainjobs,) = [one for one in overlay(name, "trainjobs") if key(one) == ("Role", "semiscale-trainjobs")]
    security_page = (ROOT / "SECURITY.md").read_text()
    for rule in trainjobs["rules"]:
        (resource,) = rule["resources"]
        assert f"{resource}: {', '.join(rule['verbs'])}" in security_page, "SECURITY.md lists the rights"


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_refers_to_something_finds_it(name: str) -> None:
    names = {key(one) for one in overlay(name, "trainjobs")}
    (runtime,) = [one for one in overlay(name, "trainjobs") if one["kind"] == "TrainingRuntime"]
    (template,) = POD_TEMPLATES["TrainingRuntime"](runtime)
    assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
    assert ("PriorityClass", template["spec"]["priorityClassName"]) in names
    assert template["spec"]["restartPolicy"] == "Never", "JobSet's default removes a failed pod, and its log"
    assert runtime["metadata"]["name"] == TrainingPodResources.model_fields["runtime"].default
    (policy,) = [one for one in overlay(name) if one["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_has_a_google_account_is_told_to_be_bound_to_it(name: str) -> None:
    kustomization = (MANIFESTS / "overlays" / name / "kustomization.yaml").read_text()
    annotated = [one for one in overlay(name, "trainjobs") if "iam.gke.io/gcp-service-account" in annotations(one)]
    assert bool(annotated) == (name == "gke")
    for one in annotated:
        assert one["kind"] == "ServiceAccount"
        assert annotations(one)["iam.gke.io/gcp-service-account"] in kustomization
    if annotated:
        (bound,) = re.findall(r"for account in (.*?); do\n(?:#.*\n)*?#.*roles/iam.workloadIdentityUser", kustomization)
        assert bound.split() == [one["metadata"]["name"] for one in annotated]


def annotations(one: Object) -> Object:
    """Return an object's annotations."""
    found: Object = one["metadata"].get("annotations", {})
    return found


def test_the_rights_to_a_workdir_on_gcs_cover_its_objects_and_the_names_of_its_bucket() -> None:
    """No condition on objects can give the right to list, nor one on what is listed: it is the bucket's."""
    condition = json.loads((MANIFESTS / "overlays" / "gke" / "workdir-condition.json").read_text())
    assert condition["expression"] == 'resource.name.startsWith("projects/_/buckets/BUCKET/objects/semiscale/")'
    kustomization = (MANIFESTS / "overlays" / "gke" / "kustomization.yaml").read_text().replace("\\\n#", "")
    granted = re.findall(r"binding gs://(\w+) --role roles/storage\.(\w+) (--condition\S* \S+)?", kustomization)
    assert granted[:2] == [("DATA", "objectViewer", ""), ("BUCKET", "legacyBucketReader", "--condition None")]
    assert [(bucket, role) for bucket, role, _ in granted[2:]] == [("BUCKET", "objectUser")]
    assert "--condition-from-file workdir-condition.json" in kustomization.split("roles/storage.objectUser")[1]


def test_the_rights_to_a_workdir_on_s3_are_the_same() -> None:
    (listing, reading, writing) = json.loads((MANIFESTS / "overlays" / "plain-s3" / "s3-policy.json").read_text())[
        "Statement"
    ]
    assert (listing["Action"], reading["Action"]) == (["s3:ListBucket"], ["s3:GetObject"])
    assert reading["Resource"] == ["arn:aws:s3:::DATA/*", "arn:aws:s3:::BUCKET/semiscale/*"]
    assert writing["Resource"] == ["arn:aws:s3:::BUCKET/semiscale/*"]


GIB = 2**30
QUANTITY = {"": 1, "Gi": GIB, "Ti": 1024 * GIB}


def flavor(queue: Object, **requests: int) -> Object:
    """Return the ResourceFlavor that Kueue gives a pod: the first of a queue with room for all that it asks for."""
    (group,) = queue["spec"]["resourceGroups"]
    for one in group["flavors"]:
        quotas = {resource["name"]: amount(resource["nominalQuota"]) for resource in one["resources"]}
        if all(asked <= quotas[resource] for resource, asked in requests.items()):
            return next(each for each in overlay("gke", "kueue") if key(each) == ("ResourceFlavor", one["name"]))
    raise AssertionError("waits for ever")


def amount(quantity: int | str) -> int:
    """Return what a quantity of Kubernetes says."""
    number, unit = re.fullmatch(r"(\d+)(\D*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * QUANTITY[unit]


def test_the_queue_keeps_pods_without_a_gpu_off_the_nodes_that_have_some() -> None:
    (queue,) = [one for one in overlay("gke", "kueue") if one["kind"] == "ClusterQueue"]
    merging = flavor(queue, cpu=8, memory=16 * GIB)
    scanning = flavor(queue, cpu=16, memory=48 * GIB, **{"nvidia.com/gpu": 1})
    assert (merging["metadata"]["name"], scanning["metadata"]["name"]) == ("semiscale-cpu", "semiscale-gpu")
    assert "tolerations" not in merging.get("spec", {})
    # A label of one card in the flavor would refuse every other that a run file may select.
    assert "nodeLabels" not in scanning["spec"]


def test_what_prometheus_is_told_to_look_for_is_there() -> None:
    """By annotation, or by the Prometheus Operator, whose PodMonitor has to say all that the annotations do."""
    (monitor,) = [one for one in overlay("gke", "prometheus-operator") if one["kind"] == "PodMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"] == APP_LABELS
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    containers, _, address = endpoint["relabelings"]
    nodes = [one["name"] for pod in PODS for one in pod.values[0]["containers"]]  # type: ignore[index]
    assert containers["regex"].split("|") == ["main", *set(nodes)]
    assert address["replacement"] == f"$1:{METRICS_PORT}" == f"$1:{PROMETHEUS_ANNOTATIONS['prometheus.io/port']}"
    (policy,) = [one for one in overlay("gke") if one["kind"] == "NetworkPolicy"]
    (port,) = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    assert str(port) == METRICS_PORT


ANY = [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_is_open_as_far_as_its_comment_says(name: str) -> None:
    (policy,) = [one for one in overlay(name) if one["kind"] == "NetworkPolicy"]
    rules = policy["spec"]["egress"]
    assert [rule["ports"] for rule in rules if not rule.get("to")] == [ANY]
    assert "ports 443 and 6443 of any address" in (MANIFESTS / "base" / "network.yaml").read_text()
    dns = [rule["to"] for rule in rules if {"protocol": "UDP", "port": 53} in rule.get("ports", [])]
    asked = [peer for peers in dns for peer in peers]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in asked, "NodeLocal DNSCache answers from the node"
    cloud_dns = {"ipBlock": {"cidr": "169.254.169.254/32"}}  # Cloud DNS for GKE, as in Autopilot, from the node too
    assert (cloud_dns in asked) == (name == "gke")
    (kubeflow,) = [rule for rule in rules if "kubeflow" in json.dumps(rule)]
    # Of its services' pods: the API server, metadata, artifacts. Its database is no step's business.
    assert {port["port"] for port in kubeflow["ports"]} == {8887, 8888, 8080, 8333, 9000, 15008}
    assert [rule for rule in rules if not rule.get("ports")] == [rules[0]], "all ports to the run's own pods alone"
    blocks = [peer["ipBlock"]["cidr"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer]
    assert [cidr for cidr in blocks if not cidr.endswith("/32")] == []


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|ya29\.|gh[pousr]_\w{20}|eyJ[\w-]{20}"
    r"|(secret_access_key|password|token)['\"]?\s*[:=]\s*['\"]?\w{8}",
    re.IGNORECASE,
)


def test_there_is_no_credential_in_what_we_ship() -> None:
    shipped = [path for folder in ("manifests", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(shipped) > 15
    assert [path.name for path in shipped if SECRET.search(path.read_text())] == []
    assert SECRET.search("AWS_SECRET_ACCESS_KEY=abcdefghijk")
    kinds = {one["kind"] for case in CASES for one in overlay(*case)}
    assert "Secret" not in kinds
