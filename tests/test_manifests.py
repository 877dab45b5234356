"""The manifests of every overlay: strict schemas, pod security, least privilege, no credentials."""

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

from components.shared.hardware import TrainingMachine
from tests.kustomize import Object, build

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "manifests"
SCHEMAS = Path(__file__).parent / "schemas"
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
)
# Kinds of pods and what holds a pod's template, by the path to it.
POD_TEMPLATES = {
    "TrainingRuntime": lambda one: [
        job["template"]["spec"]["template"] for job in one["spec"]["template"]["spec"]["replicatedJobs"]
    ]
}


@functools.cache
def overlay(name: str, standalone: bool = False) -> tuple[Object, ...]:
    """Return the objects of an overlay, for Kubeflow's profiles or for Kubeflow Pipelines alone."""
    objects = build(MANIFESTS / "overlays" / name)
    return tuple(build(MANIFESTS / "components" / "standalone", objects) if standalone else objects)


CASES = [(name, standalone) for name in OVERLAYS for standalone in (False, True)]
OBJECTS = [
    pytest.param(one, id=f"{name}{'-standalone' * standalone}-{one['kind']}-{one['metadata']['name']}")
    for name, standalone in CASES
    for one in overlay(name, standalone)
]
PODS = [
    pytest.param(template["spec"], id=f"{name}-{one['metadata']['name']}")
    for name in OVERLAYS
    for one in overlay(name)
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
    for one in overlay("gke"):
        spec = next(name for name in ("spec", "rules", "metadata", "value") if name in one)
        with pytest.raises(jsonschema.ValidationError):
            validate({**one, "surplus": {}, spec: one[spec]})


def test_the_build_is_kustomizes(tmp_path: Path) -> None:
    kustomize = shutil.which("kustomize") or shutil.which("kustomize", path=str(Path.home() / "go" / "bin"))
    if not kustomize:
        pytest.skip("no kustomize: go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.1")
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    for name, standalone in CASES:
        folder = tmp_path / "manifests" / "overlays" / name
        if standalone:
            command = [kustomize, "edit", "add", "component", "../../components/standalone"]
            subprocess.run(command, cwd=folder, check=True)
        done = subprocess.run([kustomize, "build", str(folder)], capture_output=True, text=True, check=True)
        theirs = [one for one in yaml.safe_load_all(done.stdout) if one]
        assert sorted(map(key, theirs)) == sorted(map(key, overlay(name, standalone)))
        for one in theirs:
            assert one == next(mine for mine in overlay(name, standalone) if key(mine) == key(one))


def key(one: Object) -> tuple[str, str]:
    """Return what tells an object from the others."""
    return one["kind"], one["metadata"]["name"]


@pytest.mark.parametrize("pod", PODS)
def test_pods_meet_the_security_level_restricted(pod: Object) -> None:
    assert violations(pod) == []


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
    assert not [one["kind"] for one in overlay(name, standalone=True) if one["kind"] in whole]
    for one in overlay(name, standalone=True):
        assert one["kind"] != "NetworkPolicy" or one["spec"]["podSelector"].get("matchLabels")
    for standalone, expected in ((False, "semiscale"), (True, "kubeflow")):
        namespaced = [one for one in overlay(name, standalone) if one["kind"] in NAMESPACED]
        assert {one["metadata"]["namespace"] for one in namespaced} == {expected}
        (binding,) = [one for one in namespaced if one["kind"] == "RoleBinding"]
        assert binding["subjects"][0]["namespace"] == expected


@pytest.mark.parametrize("name", OVERLAYS)
def test_roles_name_what_they_allow(name: str) -> None:
    roles = [one for one in overlay(name) if one["kind"] in ("Role", "ClusterRole")]
    assert [one["kind"] for one in roles] == ["Role"]
    for rule in roles[0]["rules"]:
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "secrets" not in rule["resources"] or rule.get("resourceNames")


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_refers_to_something_finds_it(name: str) -> None:
    names = {(one["kind"], one["metadata"]["name"]) for one in overlay(name)}
    (runtime,) = [one for one in overlay(name) if one["kind"] == "TrainingRuntime"]
    (template,) = POD_TEMPLATES["TrainingRuntime"](runtime)
    assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
    assert ("PriorityClass", template["spec"]["priorityClassName"]) in names
    assert runtime["metadata"]["name"] == TrainingMachine.model_fields["runtime"].default
    (policy,) = [one for one in overlay(name) if one["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_has_a_google_account_is_told_to_be_bound_to_it(name: str) -> None:
    told = (MANIFESTS / "overlays" / name / "kustomization.yaml").read_text()
    annotated = [one for one in overlay(name) if "iam.gke.io/gcp-service-account" in annotations(one)]
    assert bool(annotated) == (name == "gke")
    for one in annotated:
        assert one["kind"] == "ServiceAccount"
        assert annotations(one)["iam.gke.io/gcp-service-account"] in told
    if annotated:
        (bound,) = re.findall(r"for account in (.*?); do\n(?:#.*\n)*?#.*roles/iam.workloadIdentityUser", told)
        assert bound.split() == [one["metadata"]["name"] for one in annotated]


def annotations(one: Object) -> Object:
    """Return an object's annotations."""
    found: Object = one["metadata"].get("annotations", {})
    return found


def test_the_rights_to_a_workdir_cover_its_objects_and_listings_and_no_others() -> None:
    condition = json.loads((MANIFESTS / "overlays" / "gke" / "workdir-condition.json").read_text())
    terms = [term.strip() for term in condition["expression"].split("||")]
    attribute = 'api.getAttribute("storage.googleapis.com/objectListPrefix", "")'
    asked = {term[: term.rindex(".startsWith(")]: json.loads(term[term.rindex("(") + 1 : -1]) for term in terms}
    assert asked == {"resource.name": "projects/_/buckets/BUCKET/objects/semiscale/", attribute: "semiscale/"}


GIB = 2**30
QUANTITY = {"": 1, "Gi": GIB, "Ti": 1024 * GIB}


def flavor(queue: Object, **requests: int) -> Object:
    """Return the ResourceFlavor that Kueue gives a pod: the first of a queue with room for all that it asks for."""
    (group,) = queue["spec"]["resourceGroups"]
    for one in group["flavors"]:
        quotas = {resource["name"]: amount(resource["nominalQuota"]) for resource in one["resources"]}
        if all(asked <= quotas[resource] for resource, asked in requests.items()):
            return next(each for each in overlay("gke") if key(each) == ("ResourceFlavor", one["name"]))
    raise AssertionError("waits for ever")


def amount(quantity: int | str) -> int:
    """Return what a quantity of Kubernetes says."""
    number, unit = re.fullmatch(r"(\d+)(\D*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * QUANTITY[unit]


def test_the_queue_keeps_pods_without_a_gpu_off_the_nodes_that_have_some() -> None:
    (queue,) = [one for one in overlay("gke") if one["kind"] == "ClusterQueue"]
    merging = flavor(queue, cpu=8, memory=16 * GIB)
    scanning = flavor(queue, cpu=16, memory=48 * GIB, **{"nvidia.com/gpu": 1})
    assert (merging["metadata"]["name"], scanning["metadata"]["name"]) == ("semiscale-cpu", "semiscale-gpu")
    assert "tolerations" not in merging.get("spec", {})
    # A label of one card in the flavor would refuse every other that a run file may select.
    assert "nodeLabels" not in scanning["spec"]


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
    kinds = {one["kind"] for name in OVERLAYS for one in overlay(name)}
    assert "Secret" not in kinds
