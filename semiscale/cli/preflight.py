"""Checks before a run is submitted: inputs that a cluster cannot read or that the plan would refuse."""

import re
from pathlib import Path

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.config.run_parameters import INPUT_URI_KEYS
from semiscale.models import registry

# Iterations of all loops of a run that Argo can store. Each takes 9 kB of the Workflow object, which has 1 MiB at most.
MAX_LOOP_ITERATIONS = 40


def preflight(path: Path) -> RunConfig:
    """Load and check a run file for a cluster.

    An input that this machine cannot read is noted and left to the plan.

    Args:
        path: The run file.

    Raises:
        InvalidInputError: The plan would refuse the run file, or a path is local.

    Cost:
        One listing request for each input.
    """
    settings = run_config.load_run_config(path)
    check_fan_out(settings)
    for key in ("teacher_architecture", "student_architecture"):
        registry.get_architecture(getattr(settings, key), key)
    for key in ("workdir", *INPUT_URI_KEYS):
        value = getattr(settings, key)
        for uri in value if isinstance(value, list) else [value] if value else []:
            check_remote_uri(key, uri)
            if key != "workdir":
                check_uri_exists(key, uri)
    return settings


def check_fan_out(settings: RunConfig) -> None:
    """Check that Argo can store the loops of a run. It would refuse the Workflow in the middle of the run.

    Args:
        settings: The run file.

    Raises:
        InvalidInputError: The loops have more than MAX_LOOP_ITERATIONS iterations.
    """
    rates = len(settings.baseline_learning_rates) + len(settings.finetune_learning_rates)
    # The loop of a scan or a packing that is a Job has one iteration, which follows the Job.
    is_loop = settings.hardware.choose_fan_out(settings.pods).scan.fan_out == "loop"
    iterations = 2 * (settings.pods if is_loop else 1) + rates
    if iterations <= MAX_LOOP_ITERATIONS:
        return
    if is_loop:
        raise InvalidInputError(
            "SEMI-E444",
            f"pods: {settings.pods} pods that score, {settings.pods} that pack and {rates} learning rates are "
            f"{iterations} iterations of loops. A Workflow holds {MAX_LOOP_ITERATIONS}. Set hardware.scan.fan_out to "
            f"job, or pods to {max((MAX_LOOP_ITERATIONS - rates) // 2, 1)} or less.",
        )
    raise InvalidInputError(
        "SEMI-E444",
        f"baseline_learning_rates and finetune_learning_rates: {rates} learning rates are {iterations} iterations of "
        f"loops with scan and packing. A Workflow holds {MAX_LOOP_ITERATIONS}. Give fewer learning rates.",
    )


def check_remote_uri(key: str, uri: str) -> None:
    """Check that a URI is not a path of this machine.

    `file:///…` is a folder that every pod mounts.

    Args:
        key: Run-file key of the URI.
        uri: The URI.

    Raises:
        InvalidInputError: The URI is a path of this machine.
    """
    if "://" not in uri:
        raise InvalidInputError(
            "SEMI-E420",
            f"{key}: {uri} is a path of this machine. Use gs://, s3://, or file:/// for a folder that every "
            "pod mounts.",
        )


def check_uri_exists(key: str, uri: str) -> None:
    """Check that an object store has an object at a URI, or note that this cannot be checked.

    Args:
        key: Run-file key of the URI.
        uri: The URI.

    Raises:
        InvalidInputError: There is no object.
    """
    if not storage.is_object_store(uri):
        return
    folder = uri.rpartition("/")[0] if "*" in uri else uri
    try:
        first_object = next(iter(storage.list_objects(folder)), None)
    except InvalidInputError:
        raise
    # The client of any vendor can miss credentials here. The pods have their own.
    except Exception as error:  # noqa: BLE001
        print(f"not checked from here: {key}: {uri}: {to_single_line(str(error))[:200]}")
        return
    if first_object is None:
        raise InvalidInputError("SEMI-E421", f"{key}: {uri} has no object. Check the URI.")


def check_images_pushed(compiled: str) -> None:
    """Check that the nodes of a cluster can pull every image of a compiled pipeline.

    Args:
        compiled: The compiled pipeline.

    Raises:
        InvalidInputError: An image is in no registry.
    """
    for image in sorted(set(re.findall(r"^\s*image: (\S+)$", compiled, re.MULTILINE))):
        host, _, repository = image.partition("/")
        if not repository or not re.search(r"[.:]|^localhost$", host):
            raise InvalidInputError(
                "SEMI-E422",
                f"{image}: The image is not in a registry. Push the images (make images PUSH=…), or give "
                "--images-on-nodes if every node has them.",
            )
