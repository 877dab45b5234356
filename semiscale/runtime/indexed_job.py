"""Share work among the pods of an Indexed Job of Kubernetes: create the Job with this image and follow it.

The pods run the same stage with the same options, and each has its own number. They share the work by leases. No pod
returns before all the work is done, so the first pod that succeeds is the end. Kubernetes replaces a pod that crashes,
is killed for memory or times out. See https://kubernetes.io/docs/concepts/workloads/controllers/job.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.errors import AbandonedError, SemiscaleError
from semiscale.config.resources import (
    APP_LABELS,
    IMAGE_UID,
    JOB_ENDING_EXIT_CODES,
    METRICS_PORT,
    PROMETHEUS_ANNOTATIONS,
    S3_CREDENTIAL_ENV,
    IndexedJobSettings,
)
from semiscale.observability.progress import TERMINATION_LOG_ENV, log_info
from semiscale.observability.prometheus import PORT_ENV
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.runtime.follower import FOLLOWED_ENV
from semiscale.runtime.job_client import (
    DELETED_ID,
    TERMINATION_LOG,
    JobClient,
    JobKind,
    end_condition,
    stage_options,
)
from semiscale.runtime.stage_config import StageConfig
from semiscale.storage.documents import load_document

CONTAINER = "stage"
# Kubernetes gives each pod this label with its number.
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
# Kubernetes sets this variable of each pod to its number.
INDEX = "$(JOB_COMPLETION_INDEX)"
# A pod needs this time to end a batch and to release its leases.
TERMINATION_GRACE_S = 120
# An ended Job whose follower is gone is kept so long for its logs.
KEPT_S = 24 * 3600
# The other pods find within seconds that all the work is done. They are deleted after this time.
END_GRACE_S = 60.0
# With this annotation Kueue starts a Job with any quota, down to one pod.
MIN_PARALLELISM = {"kueue.x-k8s.io/job-min-parallelism": "1"}


def run_indexed_job(
    config: StageConfig, count: str, launch: IndexedJobSettings, folder: str, is_finished: Callable[[], bool]
) -> None:
    """Work on the pods of a Job until all the work in a folder is finished.

    Nothing is started if it is finished already.

    Args:
        config: Config of the stage. Its field `pod` is the number of a pod.
        count: Receipt with the number of pods.
        launch: Machines, image and labels of the Job.
        folder: URI of the work's folder.
        is_finished: Returns whether all the work is finished.

    Raises:
        InvalidInputError: A pod or the API server refused its input. The message has the last line of the pod.
        SemiscaleError: The Job failed. It is kept for its logs until the next attempt.
        TerminatedError: SIGTERM arrived. The Job is deleted, and its pods release their leases in their grace period.
    """
    if is_finished():
        return
    receipt = load_document(count, FanoutReceipt)
    job = job_name(config, folder)
    client = JobClient(
        JobKind(
            stage=config.stage,
            kind="Job",
            group="batch",
            version="v1",
            plural="jobs",
            pod="pod",
            container=CONTAINER,
            name_label="batch.kubernetes.io/job-name",
            first_pod_labels=f"{INDEX_LABEL}=0",
        ),
        job,
    )
    # The pods cannot read the follower's copy of this receipt, and no stage keeps it in the workdir.
    copied_count = storage.join(folder, "count.json")
    storage.write_bytes(copied_count, receipt.model_dump_json().encode())
    with client.followed(folder):
        content = build_job(config, job, copied_count, receipt.pods, launch, client.own_pod())
        size = f"{receipt.pods} pods"
        is_created = client.create_or_attach(content, size)
        try:
            _follow(client, config.stage, is_finished)
        except SemiscaleError as error:
            # An earlier run was cancelled, and its pods were stopping when this one attached to its Job.
            if is_created or error.exit_code != AbandonedError.exit_code:
                raise
            client.create_or_attach(content, size)
            _follow(client, config.stage, is_finished)
    if not is_finished():
        raise SemiscaleError(
            "SEMI-E256", f"{folder}: is not finished, but a pod of Job {job} has succeeded. Run the stage again."
        )


def job_name(config: StageConfig, folder: str) -> str:
    """Return the name of the Job, which is the same for everybody who works in a folder.

    Args:
        config: Config of the stage.
        folder: URI of the work's folder.
    """
    return f"semiscale-{config.stage}-{content_digest(folder)}"


def build_job(
    config: StageConfig, name: str, count: str, pods: int, launch: IndexedJobSettings, follower: Any
) -> dict[str, Any]:
    """Return the Job of a scan or a packing.

    Args:
        config: Config of the stage. Its field `pod` is the number of a pod.
        name: Name of the Job.
        count: URI of the receipt with the number of pods, for the pods.
        pods: Number of pods.
        launch: Machines, image and labels of the Job.
        follower: The pod that creates the Job. Its service account and its pull secrets are those of the Job's pods.
    """
    rules = [
        # A pod that was evicted, preempted or lost with its node does not count as a failure.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        # Another attempt of these would end in the same way.
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(JOB_ENDING_EXIT_CODES)},
        },
    ]
    pod_spec = _pod_spec(stage_options(config, count=count, pod=INDEX), config.stage, launch)
    pod_spec["serviceAccountName"] = follower.spec.service_account_name
    if secrets := follower.spec.image_pull_secrets:
        pod_spec["imagePullSecrets"] = [{"name": secret.name} for secret in secrets]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "labels": {**APP_LABELS, **launch.kueue_labels()},
            "annotations": MIN_PARALLELISM if launch.queue else {},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimitPerIndex": launch.machine.retries,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": APP_LABELS, "annotations": PROMETHEUS_ANNOTATIONS}, "spec": pod_spec},
        },
    }


def _pod_spec(options: list[str], stage: str, launch: IndexedJobSettings) -> dict[str, Any]:
    """Return the pods' content, with the hardware and the settings that pods of Kubeflow Pipelines have."""
    machine = launch.machine
    amount = {"cpu": machine.cpu, "memory": machine.memory} | ({machine.gpu: str(machine.gpus)} if machine.gpus else {})
    env: list[dict[str, Any]] = [
        {"name": PORT_ENV, "value": METRICS_PORT},
        # The pods stop if no task follows them any more.
        {"name": FOLLOWED_ENV, "value": "1"},
        {"name": TERMINATION_LOG_ENV, "value": TERMINATION_LOG},
    ]
    if launch.secret:
        env += [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": launch.secret, "key": key}}}
            for key in S3_CREDENTIAL_ENV
        ]
    # The root file system cannot be written.
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
    if machine.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": machine.shared_memory}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108
    container = {
        "name": CONTAINER,
        "image": launch.image,
        "command": ["python", "-m", f"semiscale.stages.{stage}"],
        "args": options,
        "env": env,
        "resources": {"requests": amount, "limits": amount},
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": machine.timeout_s,
        "terminationGracePeriodSeconds": TERMINATION_GRACE_S,
        # The pods need the object store and nothing of the cluster.
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": IMAGE_UID,
            "runAsGroup": IMAGE_UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if machine.node_selector:
        spec["nodeSelector"] = machine.node_selector
    if machine.tolerations:
        spec["tolerations"] = machine.toleration_fields()
    return spec


def _follow(client: JobClient, stage: str, is_finished: Callable[[], bool]) -> None:
    """Log the progress of the Job until a pod has succeeded.

    Raises:
        SemiscaleError: The Job failed, or was deleted. It has the error of the first failed pod.
    """
    failed_indexes, succeeded_at = "", None
    try:
        for job in client.watch_states():
            status = job.get("status", {})
            # A pod returns when all the work is done. An index that failed for good does not matter then.
            if status.get("completedIndexes"):
                succeeded_at = succeeded_at or time.monotonic()
                if not status.get("active") or time.monotonic() - succeeded_at > END_GRACE_S:
                    break
                continue
            if end := end_condition(job):
                if end["type"] == "Failed":
                    raise client.build_error(end)
                break
            if status.get("failedIndexes", "") != failed_indexes:
                failed_indexes = status["failedIndexes"]
                latest = re.split("[,-]", failed_indexes)[-1]
                cause = client.find_failure(f"{INDEX_LABEL}={latest}")
                log_info(stage, f"pods {failed_indexes} have failed for good, the other pods take over: {cause}")
            client.log_progress()
    except SemiscaleError as error:
        # Another run that worked in the same folder deletes the Job when it finds the work finished.
        if error.code != DELETED_ID or not is_finished():
            raise
    log_info(stage, "the work of the Job is complete")
