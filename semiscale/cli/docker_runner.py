"""Containers for a run on this machine: what each may see, read and write."""

import contextlib
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from kfp import local

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_config import RunConfig
from semiscale.config.run_parameters import INPUT_URI_KEYS
from semiscale.observability import budget
from semiscale.observability.progress import LOG_FORMAT_ENV

# What the stores' clients read; nothing of it is written into an image or a log.
CREDENTIALS = re.compile(r"AWS_|GOOGLE_CLOUD_PROJECT$|STORAGE_EMULATOR_HOST$|(HTTPS?|NO)_PROXY$", re.IGNORECASE)
THREADS = "OMP_NUM_THREADS"  # two containers at a time share the cores
KEY_FILES = ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")


def docker_runner(settings: RunConfig, compiled: str) -> local.DockerRunner:
    """Return kfp's runner of containers: as this user, on a root file system that cannot be written to.

    The run's local inputs are mounted for reading and its workdir for writing, where they are. Without a bucket among
    them, containers have no network. Raises InvalidInputError where there is no Docker, or no image.
    """
    require_docker(sorted(set(re.findall(r"^\s*image: (\S+)$", compiled, re.MULTILINE))))
    remote = [uri for uri in run_uris(settings) if storage.is_object_store(uri)]
    return local.DockerRunner(
        mounts=mounts(settings),
        environment=container_environment(bool(remote)),
        user=f"{os.getuid()}:{os.getgid()}",
        read_only=True,
        tmpfs={"/tmp": ""},  # noqa: S108 - inside the container
        **({} if remote else {"network_mode": "none"}),
        **({"device_requests": [gpu_request()]} if budget.count_gpus() else {}),
    )


def require_docker(images: list[str]) -> None:
    """Raise InvalidInputError where Docker or one of the images is missing."""
    try:
        docker = import_module("docker")  # this repository's folder of that name hides it from mypy
    except ImportError:
        raise InvalidInputError(
            "--docker: Python's docker package is missing; run make setup, or pip install docker"
        ) from None
    try:
        with contextlib.closing(docker.from_env()) as client:
            known = {tag for image in client.images.list() for tag in image.tags}
    except docker.errors.DockerException as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(
            f"--docker: no Docker daemon answers ({reason}); start one, or set DOCKER_HOST"
        ) from None
    for image in images:
        if image not in known:
            raise InvalidInputError(f"--docker: no image {image}; build it: make images")


def run_uris(settings: RunConfig) -> list[str]:
    """Return all places of a run."""
    values = [getattr(settings, name) for name in INPUT_URI_KEYS]
    listed = [uri for value in values for uri in (value if isinstance(value, list) else [value])]
    return [*filter(None, listed), settings.workdir]


def mounts(settings: RunConfig) -> list[Any]:
    """Return the bind mounts: what is local, each at its own path; the workdir for writing."""
    from docker.types import Mount

    workdir = () if storage.is_object_store(settings.workdir) else (storage.uri_to_path(settings.workdir),)
    for path in workdir:
        path.mkdir(parents=True, exist_ok=True)
    local_uris = [uri for uri in run_uris(settings)[:-1] if not storage.is_object_store(uri)]
    paths = {mount_source(storage.uri_to_path(uri)) for uri in local_uris}
    keys = {Path(os.environ[name]).absolute() for name in KEY_FILES if name in os.environ}
    readable = sorted(path for path in paths | keys if path.exists() and path not in workdir)
    return [
        *(Mount(str(path), str(path), type="bind") for path in workdir),
        *(Mount(str(path), str(path), type="bind", read_only=True) for path in readable),
    ]


def mount_source(path: Path) -> Path:
    """Return what to mount for a path: its folder, where the name is a pattern."""
    return path.parent if "*" in path.name else path


def container_environment(remote: bool) -> dict[str, str]:
    """Return what containers know of this environment: the log's form, and how to reach the buckets."""
    given = {name: value for name, value in os.environ.items() if remote and CREDENTIALS.match(name)}
    given |= {name: str(Path(os.environ[name]).absolute()) for name in KEY_FILES if name in os.environ}
    given |= {THREADS: os.environ[THREADS]} if THREADS in os.environ else {}
    return {**given, "HOME": "/tmp", LOG_FORMAT_ENV: os.environ.get(LOG_FORMAT_ENV, "plain")}  # noqa: S108 - inside the container


def gpu_request() -> Any:
    """Return the request for all GPUs."""
    from docker.types import DeviceRequest

    return DeviceRequest(count=-1, capabilities=[["gpu"]])
