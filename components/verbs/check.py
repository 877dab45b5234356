"""What is refused before a run is submitted: what the cluster could not read, and what the plan would refuse later."""

import re
from pathlib import Path

from components.shared import architectures, runfile, storage
from components.shared.errors import Refused
from components.shared.runfile import PLACES, RunFile
from components.shared.wording import one_line


def checked(path: Path) -> RunFile:
    """Read a run file that is meant for a cluster. Raises Refused where the plan would, or where a path is local.

    Lists the first object of each input. What this machine may not read is left to the plan, with a note.
    """
    settings = runfile.load(path)
    for key in ("teacher_architecture", "student_architecture"):
        architectures.find(getattr(settings, key), key)
    for key in ("workdir", *PLACES):
        value = getattr(settings, key)
        for uri in value if isinstance(value, list) else [value] if value else []:
            refuse_local(key, uri)
            if key != "workdir":
                refuse_absent(key, uri)
    return settings


def refuse_local(key: str, uri: str) -> None:
    """Raise Refused for a path of this machine. `file:///…` stands for a folder that every pod mounts."""
    if "://" not in uri:
        raise Refused(
            f"{key}: {uri}: a path of this machine; a cluster reads gs://, s3://, or file:/// that pods mount"
        )


def refuse_absent(key: str, uri: str) -> None:
    """Raise Refused where there is nothing at a URI; says so where this machine cannot tell."""
    if not storage.is_remote(uri):
        return
    folder = uri.rpartition("/")[0] if "*" in uri else uri
    try:
        found = next(iter(storage.entries(folder)), None)
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001 - no credentials here, of any vendor: the pods have their own
        print(f"not checked from here: {key}: {uri}: {one_line(str(error))[:200]}")
        return
    if found is None:
        raise Refused(f"{key}: {uri}: nothing here; check the URI")


def refuse_unpushed(compiled: str) -> None:
    """Raise Refused where a compiled pipeline names an image of no registry: nodes could not pull it."""
    for image in sorted(set(re.findall(r"^\s*image: (\S+)$", compiled, re.MULTILINE))):
        registry, _, rest = image.partition("/")
        if not rest or not re.search(r"[.:]|^localhost$", registry):
            raise Refused(
                f"{image}: not in a registry; push the images (make images PUSH=…), or say --images-on-nodes where "
                "every node has them"
            )
