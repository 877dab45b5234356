"""Test schemas, pod security, rights and credentials of every overlay."""

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

from semiscale.config.resources import APP_LABELS, METRICS_PORT, PROMETHEUS_ANNOTATIONS, TrainingPodResources
from tests.support.kustomize import Object, build

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
# The oldest supported version, and the newest one of the schemas.
KUBERNETES = ("1.30", "1.37")
# Kinds of Kubernetes that the oldest supported version does not serve, with their first version.
FIRST_VERSIONS = {"MutatingAdmissionPolicy": "1.36", "MutatingAdmissionPolicyBinding": "1.36"}
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
NAMESPACED = (
    *("ServiceAccount", "Role", "RoleBinding", "ResourceQuota", "NetworkPolicy"),
    *("TrainingRuntime", "LocalQueue", "PodMonitor"),
)
# The kinds of objects with pod templates, and a function that returns the templates.
POD_TEMPLATES = {
    "TrainingRuntime": lambda item: [
        job["template"]["spec"]["template"] for job in item["spec"]["template"]["spec"]["replicatedJobs"]
    ]
}
# The components are in the order of an overlay.
COMPONENTS = ("trainjobs", "kueue", "prometheus-operator", "graceful-stop", "standalone")


@functools.cache
def overlay(name: str, *components: str) -> tuple[Object, ...]:
    """Return the objects of an overlay with components added to it."""
    return tuple(build(MANIFESTS / "overlays" / name, components))


# An overlay has no component, one, all, or all on a cluster with Kubeflow's profiles.
CHOICES = ((), *((component,) for component in COMPONENTS), COMPONENTS, COMPONENTS[:-1])
CASES = [(name, *components) for name in OVERLAYS for components in CHOICES]
OBJECTS = {
    json.dumps(item): pytest.param(item, id="-".join([*case, item["kind"], item["metadata"]["name"]]))
    for case in CASES
    for item in overlay(*case)
}.values()
PODS = [
    pytest.param(template["spec"], id=f"{name}-{item['metadata']['name']}")
    for name in OVERLAYS
    for item in overlay(name, "trainjobs")
    if item["kind"] in POD_TEMPLATES
    for template in POD_TEMPLATES[item["kind"]](item)
]


def validate(item: Object) -> None:
    """Check an object against the strict schema of its kind.

    Raises:
        ValidationError: The object has an unknown or invalid field.
    """
    group, _, version = item["apiVersion"].rpartition("/")
    path = SCHEMAS / f"{group}_{version}_{item['kind']}.json"
    if path.exists():
        jsonschema.Draft202012Validator(json.loads(path.read_text())).validate(item)
        return
    for kubernetes in (FIRST_VERSIONS.get(item["kind"], KUBERNETES[0]), KUBERNETES[1]):
        kubernetes_validate.validate(item, kubernetes, strict=True)


@pytest.mark.parametrize("item", OBJECTS)
def test_every_object_passes_its_strict_schema(item: Object) -> None:
    validate(item)


def test_the_schemas_refuse_unknown_fields() -> None:
    for item in overlay("gke", *COMPONENTS[:-1]):
        spec = next(name for name in ("spec", "rules", "metadata", "value") if name in item)
        with pytest.raises(jsonschema.ValidationError):
            validate({**item, "surplus": {}, spec: item[spec]})


def test_the_objects_equal_those_of_kustomize(tmp_path: Path) -> None:
    kustomize = shutil.which("kustomize") or shutil.which("kustomize", path=str(Path.home() / "go" / "bin"))
    if not kustomize:
        pytest.skip("no kustomize: go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.1")
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    for name, *components in CASES:
        folder = tmp_path / "manifests" / "overlays" / f"{name}-{'-'.join(components)}"
        shutil.copytree(MANIFESTS / "overlays" / name, folder)
        if components:
            paths = [f"../../components/{component}" for component in components]
            subprocess.run([kustomize, "edit", "add", "component", *paths], cwd=folder, check=True)
        completed = subprocess.run([kustomize, "build", str(folder)], capture_output=True, text=True, check=True)
        theirs = [item for item in yaml.safe_load_all(completed.stdout) if item]
        assert sorted(map(key, theirs)) == sorted(map(key, overlay(name, *components)))
        for item in theirs:
            assert item == next(mine for mine in overlay(name, *components) if key(mine) == key(item))


def key(item: Object) -> tuple[str, str]:
    """Return the kind and the name of an object."""
    return item["kind"], item["metadata"]["name"]


@pytest.mark.parametrize("pod", PODS)
def test_pods_meet_the_security_level_restricted(pod: Object) -> None:
    assert violations(pod) == []


# Kubeflow Pipelines 2.17 sets this for the container of every stage.
# https://github.com/kubeflow/pipelines/blob/2.17.0/backend/src/v2/compiler/argocompiler/security_context.go
SECURITY_OF_KUBEFLOW = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
COMPILED = [MANIFESTS / "pipeline.yaml", *sorted((MANIFESTS / "compiled").glob("*.yaml"))]


def stage_pods(compiled: Path, kubeflows: Object) -> dict[str, Object]:
    """Return the pods of a compiled pipeline's stages with their security settings.

    Args:
        compiled: The compiled pipeline.
        kubeflows: The settings that Kubeflow adds.
    """
    (_, platform) = yaml.safe_load_all(compiled.read_text())
    pods = {}
    for stage, executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        # protobuf's JSON has integers as text.
        own = {
            name: value if isinstance(value, bool) else int(value)
            for name, value in executor["securityContext"].items()
        }
        mounts = executor.get("emptyDirMounts", [])
        volumes = [{"name": mount["volumeName"], "emptyDir": {"sizeLimit": mount["sizeLimit"]}} for mount in mounts]
        pods[stage] = {"containers": [{"name": "main", "securityContext": {**kubeflows, **own}}], "volumes": volumes}
    return pods


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_the_pod_of_a_stage_is_restricted_only_with_the_settings_of_kubeflow(compiled: Path) -> None:
    whole, ours = stage_pods(compiled, SECURITY_OF_KUBEFLOW), stage_pods(compiled, {})
    assert len(whole) == 14
    assert {stage: violations(pod) for stage, pod in whole.items()} == {stage: [] for stage in whole}
    missing = ["main: allowPrivilegeEscalation", "main: capabilities", "main: seccompProfile"]
    assert {stage: violations(pod) for stage, pod in ours.items()} == dict.fromkeys(ours, missing)
    security_page = (ROOT / "SECURITY.md").read_text()
    assert [name for name in SECURITY_OF_KUBEFLOW if f"`{name}" not in security_page] == []


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
def test_violations_of_restricted_are_found(change: Object, rule: str) -> None:
    assert rule in violations({**PODS[0].values[0], **change})  # type: ignore[dict-item]


def violations(pod: Object) -> list[str]:
    """Return the rules that a pod breaks.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    problems = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
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
        problems += [f"volume {volume['name']}: {kind}" for kind in volume.keys() - {"name"} - allowed]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        problems += [
            f"{container['name']}: {rule}" for rule in _broken_rules(container, pod.get("securityContext", {}))
        ]
    return problems


def _broken_rules(container: Object, pod: Object) -> list[str]:
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
    return [rule for rule, holds in rules.items() if not holds]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_restricted_and_a_foreign_namespace_is_unchanged(name: str) -> None:
    (namespace,) = [item for item in overlay(name) if item["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    # In a foreign namespace no object may affect the pods of Kubeflow Pipelines itself.
    whole = {"Namespace", "ResourceQuota", "LimitRange"}
    assert whole <= {item["kind"] for item in overlay(name)}
    assert not [item["kind"] for item in overlay(name, "standalone") if item["kind"] in whole]
    for item in overlay(name, "standalone"):
        assert item["kind"] != "NetworkPolicy" or item["spec"]["podSelector"].get("matchLabels")
    for case in CASES:
        expected = "kubeflow" if "standalone" in case else "semiscale"
        namespaced = [item for item in overlay(*case) if item["kind"] in NAMESPACED]
        assert {item["metadata"]["namespace"] for item in namespaced} == {expected}
        bindings = [item for item in namespaced if item["kind"] == "RoleBinding"]
        assert {item["subjects"][0]["namespace"] for item in bindings} == {expected}


@pytest.mark.parametrize("name", OVERLAYS)
def test_roles_have_no_wildcards(name: str) -> None:
    roles = [item for item in overlay(name, *COMPONENTS) if item["kind"] in ("Role", "ClusterRole")]
    assert [key(item) for item in roles] == [("Role", "semiscale"), ("Role", "semiscale-trainjobs")]
    for rule in [rule for item in roles for rule in item["rules"]]:
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "secrets" not in rule["resources"] or rule.get("resourceNames")


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_run_may_make_pods_only_with_trainings_on_many_nodes(name: str) -> None:
    """A right to create pods gives access to all Secrets of the namespace.

    A pod, a job or a TrainJob can have any service account and Secret.
    """
    for components in ([], ["kueue", "standalone"]):
        for rule in [rule for item in overlay(name, *components) if item["kind"] == "Role" for rule in item["rules"]]:
            assert rule["resources"][0] in ("workflowtaskresults", "configmaps", "secrets")
            assert set(rule["verbs"]) <= {"get", "create", "patch"}
    (trainjobs,) = [item for item in overlay(name, "trainjobs") if key(item) == ("Role", "semiscale-trainjobs")]
    security_page = (ROOT / "SECURITY.md").read_text()
    for rule in trainjobs["rules"]:
        (resource,) = rule["resources"]
        assert f"{resource}: {', '.join(rule['verbs'])}" in security_page, "SECURITY.md lists the rights"


@pytest.mark.parametrize("name", OVERLAYS)
def test_references_between_objects_are_valid(name: str) -> None:
    names = {key(item) for item in overlay(name, "trainjobs")}
    (runtime,) = [item for item in overlay(name, "trainjobs") if item["kind"] == "TrainingRuntime"]
    (template,) = POD_TEMPLATES["TrainingRuntime"](runtime)
    assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
    assert ("PriorityClass", template["spec"]["priorityClassName"]) in names
    assert template["spec"]["restartPolicy"] == "Never", "JobSet's default removes a failed pod, and its log"
    assert runtime["metadata"]["name"] == TrainingPodResources.model_fields["runtime"].default
    (policy,) = [item for item in overlay(name) if item["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_google_service_account_has_instructions_for_its_binding(name: str) -> None:
    kustomization = (MANIFESTS / "overlays" / name / "kustomization.yaml").read_text()
    annotated = [item for item in overlay(name, "trainjobs") if "iam.gke.io/gcp-service-account" in annotations(item)]
    assert bool(annotated) == (name == "gke")
    for item in annotated:
        assert item["kind"] == "ServiceAccount"
        assert annotations(item)["iam.gke.io/gcp-service-account"] in kustomization
    if annotated:
        (bound,) = re.findall(r"for account in (.*?); do\n(?:#.*\n)*?#.*roles/iam.workloadIdentityUser", kustomization)
        assert bound.split() == [item["metadata"]["name"] for item in annotated]


def annotations(item: Object) -> Object:
    """Return the annotations of an object."""
    values: Object = item["metadata"].get("annotations", {})
    return values


def test_the_rights_to_a_workdir_on_gcs_cover_its_objects_and_the_names_of_its_bucket() -> None:
    """The right to list belongs to the bucket. No condition on objects can give it."""
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
MULTIPLIERS = {"": 1, "Gi": GIB, "Ti": 1024 * GIB}


def find_flavor(queue: Object, **requests: int) -> Object:
    """Return the first ResourceFlavor of a queue with room for a pod, as Kueue does."""
    (group,) = queue["spec"]["resourceGroups"]
    for entry in group["flavors"]:
        quotas = {resource["name"]: parse_quantity(resource["nominalQuota"]) for resource in entry["resources"]}
        if all(request <= quotas[resource] for resource, request in requests.items()):
            return next(item for item in overlay("gke", "kueue") if key(item) == ("ResourceFlavor", entry["name"]))
    raise AssertionError("waits forever")


def parse_quantity(quantity: int | str) -> int:
    """Return the number of a quantity of Kubernetes."""
    number, suffix = re.fullmatch(r"(\d+)(\D*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * MULTIPLIERS[suffix]


def test_the_queue_keeps_pods_without_a_gpu_off_the_nodes_that_have_some() -> None:
    (queue,) = [item for item in overlay("gke", "kueue") if item["kind"] == "ClusterQueue"]
    merging = find_flavor(queue, cpu=8, memory=16 * GIB)
    scanning = find_flavor(queue, cpu=16, memory=48 * GIB, **{"nvidia.com/gpu": 1})
    assert (merging["metadata"]["name"], scanning["metadata"]["name"]) == ("semiscale-cpu", "semiscale-gpu")
    assert "tolerations" not in merging.get("spec", {})
    # A label of one GPU type in the flavor would refuse all other types that a run file may select.
    assert "nodeLabels" not in scanning["spec"]


def test_the_targets_of_prometheus_exist() -> None:
    """The PodMonitor has the same information as the annotations."""
    (monitor,) = [item for item in overlay("gke", "prometheus-operator") if item["kind"] == "PodMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"] == APP_LABELS
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    containers, _, address = endpoint["relabelings"]
    nodes = [container["name"] for pod in PODS for container in pod.values[0]["containers"]]  # type: ignore[index]
    assert containers["regex"].split("|") == ["main", *set(nodes)]
    assert address["replacement"] == f"$1:{METRICS_PORT}" == f"$1:{PROMETHEUS_ANNOTATIONS['prometheus.io/port']}"
    (policy,) = [item for item in overlay("gke") if item["kind"] == "NetworkPolicy"]
    (port,) = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    assert str(port) == METRICS_PORT


PORTS_OPEN_TO_ANY = [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_policy_agrees_with_its_comment(name: str) -> None:
    (policy,) = [item for item in overlay(name) if item["kind"] == "NetworkPolicy"]
    rules = policy["spec"]["egress"]
    assert [rule["ports"] for rule in rules if not rule.get("to")] == [PORTS_OPEN_TO_ANY]
    assert "ports 443 and 6443 of any address" in (MANIFESTS / "base" / "network.yaml").read_text()
    dns = [rule["to"] for rule in rules if {"protocol": "UDP", "port": 53} in rule.get("ports", [])]
    resolvers = [peer for peers in dns for peer in peers]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in resolvers, "NodeLocal DNSCache answers from the node"
    # Cloud DNS for GKE, as in Autopilot, also answers from the node.
    cloud_dns = {"ipBlock": {"cidr": "169.254.169.254/32"}}
    assert (cloud_dns in resolvers) == (name == "gke")
    (kubeflow,) = [rule for rule in rules if "kubeflow" in json.dumps(rule)]
    # These are ports of its services for API, metadata and artifacts. No step needs its database.
    assert {port["port"] for port in kubeflow["ports"]} == {8887, 8888, 8080, 8333, 9000, 15008}
    assert [rule for rule in rules if not rule.get("ports")] == [rules[0]], "all ports to the run's own pods alone"
    blocks = [peer["ipBlock"]["cidr"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer]
    assert [cidr for cidr in blocks if not cidr.endswith("/32")] == []


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|ya29\.|gh[pousr]_\w{20}|eyJ[\w-]{20}"
    r"|(secret_access_key|password|token)['\"]?\s*[:=]\s*['\"]?\w{8}",
    re.IGNORECASE,
)


def test_manifests_and_images_have_no_credential() -> None:
    shipped = [path for folder in ("manifests", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(shipped) > 15
    assert [path.name for path in shipped if SECRET.search(path.read_text())] == []
    assert SECRET.search("AWS_SECRET_ACCESS_KEY=abcdefghijk")
    kinds = {item["kind"] for case in CASES for item in overlay(*case)}
    assert "Secret" not in kinds
