"""What `kustomize build` makes of manifests/, as far as they use it; a test holds it to the real kustomize.

Resources, components, a namespace, labels, JSON patches, and one strategic patch: `$patch: delete`. Anything else in a
kustomization is refused, so that this cannot quietly know less than the manifests need.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "components", "patches"}
CLUSTER_WIDE = {"PriorityClass"}  # of custom resources kustomize cannot know it; the API server drops their namespace


def build(folder: Path, added: Sequence[str] = (), below: Sequence[Object] = ()) -> list[Object]:
    """Return the objects of a kustomization; a component works on those `below` it.

    `added` are names of components beside the kustomization's folder: what `kustomize edit add component` adds to it.
    """
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert content.keys() <= KNOWN, f"{folder}: this does not know {content.keys() - KNOWN}"
    objects = list(below)
    for name in content.get("resources", []):
        path = folder / name
        objects += build(path) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text()) if one]
    for name in [*content.get("components", []), *(f"../../components/{name}" for name in added)]:
        objects = build(folder / name, below=objects)
    for patch in content.get("patches", []):
        objects = _patched(objects, patch["target"], yaml.safe_load(patch["patch"]))
    for labels in content.get("labels", []):
        for one in objects:
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
    if namespace := content.get("namespace"):
        for one in objects:
            _move(one, namespace)
    return objects


def _patched(objects: list[Object], target: Object, patch: Any) -> list[Object]:
    hit = [one for one in objects if target["kind"] == one["kind"] and target.get("name") in (None, _name(one))]
    assert hit or "name" not in target, f"no {target}"
    if isinstance(patch, dict):
        assert patch["$patch"] == "delete"
        return [one for one in objects if one not in hit]
    for one in hit:
        for change in copy.deepcopy(patch):
            assert change["op"] in ("add", "replace")
            _put(one, change["path"].strip("/").split("/"), change["value"])
    return objects


def _put(place: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        place = place[int(part) if isinstance(place, list) else part]
    if isinstance(place, list):
        assert path[-1] == "-"
        place.append(value)
    else:
        place[path[-1]] = value


def _move(one: Object, namespace: str) -> None:
    if one["kind"] == "Namespace":
        one["metadata"]["name"] = namespace
    elif one["kind"] not in CLUSTER_WIDE:
        one["metadata"]["namespace"] = namespace


def _name(one: Object) -> str:
    return str(one["metadata"]["name"])
