"""The container runner of a local run: mounts, environment and network of each container."""

import contextlib
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from kfp import local

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.common.parent_exit import PARENT_LOCK_ENV
from semiscale.config.run_config import RunConfig
from semiscale.config.run_parameters import INPUT_URI_KEYS
from semiscale.observability import budget
from semiscale.observability.progress import LOG_FORMAT_ENV

# Environment variables that the clients of object stores read. They enter no image and no log.
CREDENTIALS = re.compile(r"AWS_|GOOGLE_CLOUD_PROJECT$|STORAGE_EMULATOR_HOST$|(HTTPS?|NO)_PROXY$", re.IGNORECASE)
# Two containers at a time share the cores.
THREADS_ENV = "OMP_NUM_THREADS"
KEY_FILE_ENVS = ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")


def docker_runner(settings: RunConfig, compiled: str, parent_lock: Path) -> local.DockerRunner:
    """Return a runner of containers with the current user and a read-only root file system.

    Local inputs are mounted read-only and the workdir writable, each at its own path. Containers have a network only
    if a URI of the run is in an object store.

    Args:
        settings: The run file.
        compiled: The compiled pipeline, which names the images.
        parent_lock: File whose lock this run holds. A container stops when the lock is released.

    Raises:
        InvalidInputError: Docker or an image is missing.
    """
    require_docker(sorted(set(re.findall(r"^\s*image: (\S+)$", compiled, re.MULTILINE))))
    remote = [uri for uri in run_uris(settings) if storage.is_object_store(uri)]
    return local.DockerRunner(
        mounts=[*mounts(settings), read_only_mount(parent_lock)],
        environment={**container_environment(bool(remote)), PARENT_LOCK_ENV: str(parent_lock)},
        user=f"{os.getuid()}:{os.getgid()}",
        read_only=True,
        # A folder inside the container.
        tmpfs={"/tmp": ""},  # noqa: S108
        **({} if remote else {"network_mode": "none"}),
        **({"device_requests": [gpu_request()]} if budget.count_gpus() else {}),
    )


def require_docker(images: list[str]) -> None:
    """Check that a Docker daemon runs and has all images.

    Raises:
        InvalidInputError: Docker or an image is missing.
    """
    try:
        # The folder docker/ of this repository hides the package from mypy.
        docker = import_module("docker")
    except ImportError:
        raise InvalidInputError(
            "SEMI-E407", "--docker: The Python package docker is missing. Run make setup, or pip install docker."
        ) from None
    try:
        with contextlib.closing(docker.from_env()) as client:
            existing = {tag for image in client.images.list() for tag in image.tags}
    except docker.errors.DockerException as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(
            "SEMI-E408", f"--docker: No Docker daemon answers ({reason}). Start one, or set DOCKER_HOST."
        ) from None
    for image in images:
        if image not in existing:
            raise InvalidInputError(
                "SEMI-E409", f"--docker: {image} is not on this machine. Build it with make images."
            )


def run_uris(settings: RunConfig) -> list[str]:
    """Return the URIs of all inputs of a run, and last that of its workdir."""
    values = [getattr(settings, name) for name in INPUT_URI_KEYS]
    listed = [uri for value in values for uri in (value if isinstance(value, list) else [value])]
    return [*filter(None, listed), settings.workdir]


def mounts(settings: RunConfig) -> list[Any]:
    """Return the bind mounts: local paths at their own path, the workdir writable."""
    from docker.types import Mount

    workdir = () if storage.is_object_store(settings.workdir) else (storage.uri_to_path(settings.workdir),)
    for path in workdir:
        path.mkdir(parents=True, exist_ok=True)
    local_uris = [uri for uri in run_uris(settings)[:-1] if not storage.is_object_store(uri)]
    paths = {mount_source(storage.uri_to_path(uri)) for uri in local_uris}
    keys = {Path(os.environ[name]).absolute() for name in KEY_FILE_ENVS if name in os.environ}
    readable = sorted(path for path in paths | keys if path.exists() and path not in workdir)
    return [
        *(Mount(str(path), str(path), type="bind") for path in workdir),
        *map(read_only_mount, readable),
    ]


def read_only_mount(path: Path) -> Any:
    """Return the read-only bind mount of a path at the same path."""
    from docker.types import Mount

    return Mount(str(path), str(path), type="bind", read_only=True)


def mount_source(path: Path) -> Path:
    """Return the path to mount: the path, or the folder of a pattern."""
    return path.parent if "*" in path.name else path


def container_environment(remote: bool) -> dict[str, str]:
    """Return the environment of containers.

    It has the format of the log, and the credentials for object stores if the run uses one.

    Args:
        remote: The run uses an object store.
    """
    environment = {name: value for name, value in os.environ.items() if remote and CREDENTIALS.match(name)}
    environment |= {name: str(Path(os.environ[name]).absolute()) for name in KEY_FILE_ENVS if name in os.environ}
    environment |= {THREADS_ENV: os.environ[THREADS_ENV]} if THREADS_ENV in os.environ else {}
    # A folder inside the container.
    return {**environment, "HOME": "/tmp", LOG_FORMAT_ENV: os.environ.get(LOG_FORMAT_ENV, "plain")}  # noqa: S108


def gpu_request() -> Any:
    """Return the request for all GPUs."""
    from docker.types import DeviceRequest

    return DeviceRequest(count=-1, capabilities=[["gpu"]])
