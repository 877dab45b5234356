"""Placement of tasks in the graph: GPUs, CPUs, memory, nodes, time limits, retries and the security context.

The `hardware` section of the run file says what a task gets (semiscale/config/resources.py). kfp traces the graph by
calling it. `use_resources` sets the hardware that it is traced for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kfp import dsl, kubernetes

from components import container_images
from semiscale.config.resources import (
    APP_LABELS,
    FAN_OUT_ENV,
    HOUR_S,
    IMAGE_UID,
    METRICS_PORT,
    PROMETHEUS_ANNOTATIONS,
    S3_CREDENTIAL_ENV,
    SUPERVISION_ENV,
    CpuPodResources,
    IndexedJobSettings,
    JobSettings,
    PodResources,
    Resources,
    Supervision,
    TrainJobSettings,
    kueue_labels,
)
from semiscale.observability.prometheus import PORT_ENV

# Time until a lost pod is replaced. A stage that crashes starts again inside its pod, without Kubeflow.
RETRY_BACKOFF = "30s"
# An attempt may wait so long for a node, a quota or an image.
MAX_QUEUE_TIME_S = 24 * HOUR_S
# The grace period of an attempt that is out of time, and the delay before the next one.
POD_OVERHEAD_S = 300
_HARDWARE = ContextVar("hardware", default=Resources())  # noqa: B039 - frozen


@contextmanager
def use_resources(hardware: Resources) -> Iterator[None]:
    """Trace the graph for this hardware within a `with`."""
    token = _HARDWARE.set(hardware)
    try:
        yield
    finally:
        _HARDWARE.reset(token)


def place_on_cpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that lists, merges, copies or reports."""
    return _add_kueue_labels(_apply_resources(task, _HARDWARE.get().cpu))


def place_on_inference_gpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that runs a model forward."""
    return _add_kueue_labels(_apply_resources(task, _HARDWARE.get().scan))


def place_count(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that counts the pods of a scan or a packing."""
    return place_on_cpu(task).set_env_variable(FAN_OUT_ENV, _HARDWARE.get().scan.fan_out or "loop")


def place_on_scoring_pods(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that scores with other pods: one of them, or the pod that follows their Job."""
    if _HARDWARE.get().scan.fan_out != "job":
        return place_on_inference_gpu(task)
    return _follow_indexed_job(task, container_images.CUDA_IMAGE, _HARDWARE.get().scan)


def place_on_packing_pods(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that packs with other pods: one of them, or the pod that follows their Job."""
    if _HARDWARE.get().scan.fan_out != "job":
        return place_on_cpu(task)
    return _follow_indexed_job(task, container_images.CPU_IMAGE, _HARDWARE.get().cpu)


def place_on_training_gpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that trains a model.

    A training on more than one node becomes a small pod, which creates a TrainJob and follows it.
    """
    hardware = _HARDWARE.get()
    machine = hardware.training
    if machine.nodes == 1:
        return _add_kueue_labels(_apply_resources(task, machine))
    launch = TrainJobSettings(
        image=container_images.CUDA_IMAGE, machine=machine, queue=hardware.queue, priority=hardware.priority
    )
    follower = CpuPodResources(cpu="1", memory="4Gi", timeout_s=machine.timeout_s, retries=machine.retries)
    return _place_follower(task, follower, launch)


def _follow_indexed_job(task: dsl.PipelineTask, image: str, machine: PodResources) -> dsl.PipelineTask:
    """Place a small pod, which creates an Indexed Job and follows it."""
    hardware = _HARDWARE.get()
    launch = IndexedJobSettings(
        image=image,
        machine=PodResources.model_validate(machine.model_dump(include=set(PodResources.model_fields))),
        queue=hardware.queue,
        priority=hardware.priority,
        secret=hardware.secret,
    )
    # Its pods may wait for a quota and be replaced, all within one attempt of the follower. It loads what a counting
    # task loads.
    timeout_s = (machine.retries + 1) * (machine.timeout_s + MAX_QUEUE_TIME_S)
    follower = CpuPodResources(cpu="1", memory=hardware.cpu.memory, timeout_s=timeout_s, retries=machine.retries)
    return _place_follower(task, follower, launch)


def _place_follower(task: dsl.PipelineTask, follower: PodResources, launch: JobSettings) -> dsl.PipelineTask:
    """Place a pod that creates a job and follows it.

    It is not queued, because it must not wait for the quota that its job takes.
    """
    return _apply_resources(task, follower).set_env_variable(launch.env, launch.model_dump_json(exclude_defaults=True))


def _apply_resources(task: dsl.PipelineTask, machine: PodResources) -> dsl.PipelineTask:
    task.set_cpu_request(machine.cpu).set_cpu_limit(machine.cpu)
    task.set_memory_request(machine.memory).set_memory_limit(machine.memory)
    if machine.gpus:
        task.set_accelerator_type(machine.gpu).set_accelerator_limit(machine.gpus)
    if machine.retries:
        # Argo counts the longest duration from the start of the first attempt, and ends a later attempt there
        # (argo-workflows issue 13044).
        window_s = _retry_window_s(machine)
        task.set_retry(machine.retries, RETRY_BACKOFF, backoff_factor=1.0, backoff_max_duration=f"{window_s}s")
    # The stages find finished work by themselves. Kubeflow's cache does not see that a bucket grew.
    task.set_caching_options(enable_caching=False)
    return _apply_kubernetes_settings(task, machine)


def _retry_window_s(machine: PodResources) -> int:
    """Return the seconds in which a pod can wait and run in every attempt at its full length."""
    return (machine.retries + 1) * (_pod_timeout_s(machine) + MAX_QUEUE_TIME_S)


def _pod_timeout_s(machine: PodResources) -> int:
    """Return the time of a pod. It has room for every attempt of its stage, which the supervisor ends in time.

    Kubernetes ends a pod that is out of time in a way that fails the task. It does so only if the supervisor hangs.
    """
    return (machine.retries + 1) * (machine.timeout_s + POD_OVERHEAD_S)


def _apply_kubernetes_settings(task: dsl.PipelineTask, machine: PodResources) -> dsl.PipelineTask:
    kubernetes.set_timeout(task, _pod_timeout_s(machine))
    supervision = Supervision(restarts=machine.retries, timeout_s=machine.timeout_s)
    task.set_env_variable(SUPERVISION_ENV, supervision.model_dump_json())
    # KFP 2.17 sets the rest of the pod security level "restricted": no escalation, no capabilities, seccomp.
    kubernetes.set_security_context(task, run_as_user=IMAGE_UID, run_as_group=IMAGE_UID, run_as_non_root=True)
    for key, value in APP_LABELS.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in PROMETHEUS_ANNOTATIONS.items():
        kubernetes.add_pod_annotation(task, key, value)
    task.set_env_variable(PORT_ENV, METRICS_PORT)
    for key, value in machine.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for taint in machine.tolerations:
        kubernetes.add_toleration(task, taint.key or None, taint.operator, taint.value or None, taint.effect or None)
    if secret := _HARDWARE.get().secret:
        kubernetes.use_secret_as_env(task, secret, {key: key for key in S3_CREDENTIAL_ENV})
    if machine.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", machine.shared_memory)  # noqa: S108
    return task


def _add_kueue_labels(task: dsl.PipelineTask) -> dsl.PipelineTask:
    hardware = _HARDWARE.get()
    for key, value in kueue_labels(hardware.queue, hardware.priority).items():
        kubernetes.add_pod_label(task, key, value)
    return task
