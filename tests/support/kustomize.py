"""Build the objects of manifests/ as `kustomize build` does.

A test compares the objects with those of the real kustomize. The module knows resources, components, a namespace,
labels, JSON patches, and the strategic patch `$patch: delete`. Any other key in a kustomization is an error.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN_KEYS = {"apiVersion", "kind", "namespace", "labels", "resources", "components", "patches"}
# kustomize does not know which custom resources are cluster-wide. The API server drops their namespace.
CLUSTER_WIDE = {"PriorityClass"}


def build(folder: Path, components: Sequence[str] = (), base: Sequence[Object] = ()) -> list[Object]:
    """Return the objects of a kustomization.

    Args:
        folder: The folder of the kustomization.
        components: Names in `components/`, which `kustomize edit add component` would add.
        base: The objects that a component changes.
    """
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert content.keys() <= KNOWN_KEYS, f"{folder}: unknown keys {content.keys() - KNOWN_KEYS}"
    objects = list(base)
    for name in content.get("resources", []):
        path = folder / name
        objects += build(path) if path.is_dir() else [item for item in yaml.safe_load_all(path.read_text()) if item]
    for name in [*content.get("components", []), *(f"../../components/{name}" for name in components)]:
        objects = build(folder / name, base=objects)
    for patch in content.get("patches", []):
        objects = _apply_patch(objects, patch["target"], yaml.safe_load(patch["patch"]))
    for labels in content.get("labels", []):
        for item in objects:
            item["metadata"].setdefault("labels", {}).update(labels["pairs"])
    if namespace := content.get("namespace"):
        for item in objects:
            _set_namespace(item, namespace)
    return objects


def _apply_patch(objects: list[Object], target: Object, patch: Any) -> list[Object]:
    matches = [item for item in objects if target["kind"] == item["kind"] and target.get("name") in (None, _name(item))]
    assert matches or "name" not in target, f"no {target}"
    if isinstance(patch, dict):
        assert patch["$patch"] == "delete"
        return [item for item in objects if item not in matches]
    for item in matches:
        for change in copy.deepcopy(patch):
            assert change["op"] in ("add", "replace")
            _set_value(item, change["path"].strip("/").split("/"), change["value"])
    return objects


def _set_value(node: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = node[int(part) if isinstance(node, list) else part]
    if isinstance(node, list):
        assert path[-1] == "-"
        node.append(value)
    else:
        node[path[-1]] = value


def _set_namespace(item: Object, namespace: str) -> None:
    if item["kind"] == "Namespace":
        item["metadata"]["name"] = namespace
    elif item["kind"] not in CLUSTER_WIDE:
        item["metadata"]["namespace"] = namespace


def _name(item: Object) -> str:
    return str(item["metadata"]["name"])
