"""What is refused before a run is submitted: what the cluster could not read, and what the plan would refuse later."""

import re
from pathlib import Path

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.config.run_parameters import INPUT_URI_KEYS
from semiscale.models import registry


def preflight(path: Path) -> RunConfig:
    """Read a run file that is meant for a cluster. Raises InvalidInputError where the plan would, or where a path is
    local.

    Lists the first object of each input. What this machine may not read is left to the plan, with a note.
    """
    settings = run_config.load_run_config(path)
    for key in ("teacher_architecture", "student_architecture"):
        registry.get_architecture(getattr(settings, key), key)
    for key in ("workdir", *INPUT_URI_KEYS):
        value = getattr(settings, key)
        for uri in value if isinstance(value, list) else [value] if value else []:
            check_remote_uri(key, uri)
            if key != "workdir":
                check_uri_exists(key, uri)
    return settings


def check_remote_uri(key: str, uri: str) -> None:
    """Raise InvalidInputError for a path of this machine. `file:///…` stands for a folder that every pod mounts."""
    if "://" not in uri:
        raise InvalidInputError(
            f"{key}: {uri}: a path of this machine; a cluster reads gs://, s3://, or file:/// that pods mount"
        )


def check_uri_exists(key: str, uri: str) -> None:
    """Raise InvalidInputError where there is nothing at a URI; says so where this machine cannot tell."""
    if not storage.is_object_store(uri):
        return
    folder = uri.rpartition("/")[0] if "*" in uri else uri
    try:
        found = next(iter(storage.list_objects(folder)), None)
    except InvalidInputError:
        raise
    except Exception as error:  # noqa: BLE001 - no credentials here, of any vendor: the pods have their own
        print(f"not checked from here: {key}: {uri}: {to_single_line(str(error))[:200]}")
        return
    if found is None:
        raise InvalidInputError(f"{key}: {uri}: nothing here; check the URI")


def check_images_pushed(compiled: str) -> None:
    """Raise InvalidInputError where a compiled pipeline names an image of no registry: nodes could not pull it."""
    for image in sorted(set(re.findall(r"^\s*image: (\S+)$", compiled, re.MULTILINE))):
        registry, _, rest = image.partition("/")
        if not rest or not re.search(r"[.:]|^localhost$", registry):
            raise InvalidInputError(
                f"{image}: not in a registry; push the images (make images PUSH=…), or say --images-on-nodes where "
                "every node has them"
            )
