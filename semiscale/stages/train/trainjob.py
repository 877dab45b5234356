"""Train on several nodes: create a Kubeflow TrainJob with this image and watch it.

The nodes run the same stage with the same options under torchrun, and write the receipt to the workdir. The TrainJob is
named by the digest of the work. A restarted pod therefore attaches to the running TrainJob.
See https://www.kubeflow.org/docs/components/trainer.
"""

from typing import Any

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.config.resources import APP_LABELS, METRICS_PORT, PROMETHEUS_ANNOTATIONS, TrainJobSettings
from semiscale.observability.progress import TERMINATION_LOG_ENV, log_info
from semiscale.observability.prometheus import PORT_ENV
from semiscale.runtime.follower import FOLLOWED_ENV
from semiscale.runtime.job_client import TERMINATION_LOG, JobClient, JobKind, end_condition, stage_options
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT_S

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
# The manager of the runtime patches in the TrainJob.
FIELD_MANAGER = "semiscale.trainer/train"
# Every torch runtime of Kubeflow gives its replicated job and its container this name.
NODE_CONTAINER = "node"
KIND = JobKind(
    stage="train",
    kind="TrainJob",
    group=GROUP,
    version=VERSION,
    plural=PLURAL,
    pod="node",
    container=NODE_CONTAINER,
    name_label="jobset.sigs.k8s.io/jobset-name",
)


def run_trainjob(config: TrainConfig, launch: TrainJobSettings) -> None:
    """Train on the nodes of a TrainJob until the receipt is in the workdir.

    Nothing is started if the receipt is there already.

    Args:
        config: The training.
        launch: Machines, image and labels of the TrainJob.

    Raises:
        InvalidInputError: A node or the API server refused its input. The message has the last line of the node.
        SemiscaleError: The TrainJob failed. It is kept for its logs until the next attempt.
        TerminatedError: SIGTERM arrived. The TrainJob is deleted, its nodes save a checkpoint in their grace period,
            and the next attempt resumes from it.
    """
    folder = config.folder()
    receipt = storage.join(folder, "receipt.json")
    if storage.head(receipt) is not None:
        return
    job = build_trainjob(config, launch)
    name = job["metadata"]["name"]
    client = JobClient(KIND, name)
    with client.followed(folder):
        client.create_or_attach(job, f"{launch.machine.nodes} nodes")
        _follow(client)
        log_info("train", f"TrainJob {name} is complete")
    if storage.head(receipt) is None:
        raise SemiscaleError(
            "SEMI-E256",
            f"{receipt}: is missing, but the TrainJob is complete. Check that its nodes can write to the workdir.",
        )


def _follow(client: JobClient) -> None:
    """Log the progress of node 0 until the TrainJob is complete.

    Raises:
        SemiscaleError: The TrainJob failed, or was deleted. It has the error of the first failed node.
    """
    for job in client.watch_states():
        end = end_condition(job)
        if end and end["type"] == "Failed":
            raise client.build_error(end)
        if end:
            return
        client.log_progress()


def build_trainjob(config: TrainConfig, launch: TrainJobSettings) -> dict[str, Any]:
    """Return the TrainJob of a training.

    Args:
        config: The training.
        launch: Machines, image and labels of the TrainJob.
    """
    machine = launch.machine
    amount = {"cpu": machine.cpu, "memory": machine.memory} | ({machine.gpu: machine.gpus} if machine.gpus else {})
    trainer = {
        "image": launch.image,
        # Without the dashes, torchrun parses --start as an option of its own.
        "command": ["torchrun", "-m", "--", "semiscale.stages.train"],
        "args": stage_options(config),
        "numNodes": machine.nodes,
        "numProcPerNode": max(machine.gpus, 1),
        "resourcesPerNode": {"requests": amount, "limits": amount},
        "env": [
            # Rank 0 serves the metrics of all ranks.
            {"name": PORT_ENV, "value": METRICS_PORT},
            # The nodes stop if no task follows them any more.
            {"name": FOLLOWED_ENV, "value": "1"},
            {"name": SHUTDOWN_TIMEOUT, "value": str(SHUTDOWN_TIMEOUT_S)},
            # torchrun exits with 1, whatever the exit codes of the ranks. The ranks therefore leave theirs here.
            {"name": TERMINATION_LOG_ENV, "value": TERMINATION_LOG},
        ],
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": f"semiscale-{config.digest()}", "labels": {**APP_LABELS, **launch.kueue_labels()}},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": machine.runtime},
            "trainer": trainer,
            **_runtime_patches(launch),
        },
    }


def _runtime_patches(launch: TrainJobSettings) -> dict[str, Any]:
    """Return the patches for node selector, tolerations, /dev/shm and scraping.

    The runtime defines the rest of the pod.
    """
    machine = launch.machine
    pod: dict[str, Any] = {}
    if machine.node_selector:
        pod["nodeSelector"] = machine.node_selector
    if machine.tolerations:
        pod["tolerations"] = machine.toleration_fields()
    if machine.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": machine.shared_memory}
        pod["volumes"] = [{"name": "shared-memory", "emptyDir": memory}]
        mount = {"name": "shared-memory", "mountPath": "/dev/shm"}  # noqa: S108
        pod["containers"] = [{"name": NODE_CONTAINER, "volumeMounts": [mount]}]
    template = {"metadata": {"annotations": PROMETHEUS_ANNOTATIONS}} | ({"spec": pod} if pod else {})
    job = {"name": NODE_CONTAINER, "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [job]}}}
    return {"runtimePatches": [{"manager": FIELD_MANAGER, "trainingRuntimeSpec": patch}]}
