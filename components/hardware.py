"""Puts a stage's task on its hardware, in the graph: GPUs, CPUs, memory, nodes, timeouts, retries, security.

What the hardware is, the run file says (components/shared/hardware.py). kfp traces the graph by calling it;
`asking_for` sets the hardware that it is traced for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kfp import dsl, kubernetes

from components import images
from components.shared.hardware import (
    HOUR_S,
    LAUNCH,
    METRICS_PORT,
    SCRAPED,
    STORE_KEYS,
    CpuMachine,
    Hardware,
    Launch,
    Machine,
    queue_labels,
)
from components.shared.metrics import PORT

PART_OF = {"app.kubernetes.io/part-of": "semiscale"}  # what manifests/base selects our pods by
USER = 1000  # of the images
RETRY_AFTER = "120s"  # between two tries
QUEUE_S = 24 * HOUR_S  # what a try may wait for a node, a quota or an image
_HARDWARE = ContextVar("hardware", default=Hardware())  # noqa: B039 - frozen


@contextmanager
def asking_for(hardware: Hardware) -> Iterator[None]:
    """Trace the graph for this hardware."""
    token = _HARDWARE.set(hardware)
    try:
        yield
    finally:
        _HARDWARE.reset(token)


def on_cpus(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that lists, merges, copies or reports."""
    return _queued(_placed(task, _HARDWARE.get().cpu))


def on_scan_gpus(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a task that runs a model forward."""
    return _queued(_placed(task, _HARDWARE.get().scan))


def on_training_gpus(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Place a training. One on more than one node becomes a small pod that creates a TrainJob and follows it."""
    hardware = _HARDWARE.get()
    machine = hardware.training
    if machine.nodes == 1:
        return _queued(_placed(task, machine))
    launch = Launch(image=images.CUDA, machine=machine, queue=hardware.queue, priority=hardware.priority)
    follower = CpuMachine(cpu="1", memory="4Gi", timeout_s=machine.timeout_s, retries=machine.retries)
    # Not in the queue: the TrainJob is, and its follower must not wait for the quota that it takes.
    return _placed(task, follower).set_env_variable(LAUNCH, launch.model_dump_json(exclude_defaults=True))


def _placed(task: dsl.PipelineTask, machine: Machine) -> dsl.PipelineTask:
    task.set_cpu_request(machine.cpu).set_cpu_limit(machine.cpu)
    task.set_memory_request(machine.memory).set_memory_limit(machine.memory)
    if machine.gpus:
        task.set_accelerator_type(machine.gpu).set_accelerator_limit(machine.gpus)
    if machine.retries:
        # Argo counts the longest duration from the start of the first try: what fails later is not tried again, and a
        # later try is ended there (argo-workflows issue 13044). So it has room for every try at its full length.
        window_s = (machine.retries + 1) * (machine.timeout_s + QUEUE_S)
        task.set_retry(machine.retries, RETRY_AFTER, backoff_factor=1.0, backoff_max_duration=f"{window_s}s")
    # The stages find finished work by themselves; Kubeflow's cache does not see that a bucket grew.
    task.set_caching_options(enable_caching=False)
    return _on_kubernetes(task, machine)


def _on_kubernetes(task: dsl.PipelineTask, machine: Machine) -> dsl.PipelineTask:
    kubernetes.set_timeout(task, machine.timeout_s)
    # The rest of the pod security level "restricted" KFP 2.17 sets by itself: no escalation, no capabilities, seccomp.
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    for key, value in PART_OF.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in SCRAPED.items():
        kubernetes.add_pod_annotation(task, key, value)
    task.set_env_variable(PORT, METRICS_PORT)
    for key, value in machine.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for one in machine.tolerations:
        kubernetes.add_toleration(task, one.key or None, one.operator, one.value or None, one.effect or None)
    if secret := _HARDWARE.get().secret:
        kubernetes.use_secret_as_env(task, secret, {key: key for key in STORE_KEYS})
    if machine.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", machine.shared_memory)  # noqa: S108
    return task


def _queued(task: dsl.PipelineTask) -> dsl.PipelineTask:
    hardware = _HARDWARE.get()
    for key, value in queue_labels(hardware.queue, hardware.priority).items():
        kubernetes.add_pod_label(task, key, value)
    return task
