"""Define the `hardware` section of the run file.

It is applied when the pipeline is compiled. The defaults fit the paper's models on pods with one GPU, whose CPUs decode
for it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

HOUR_S = 3600
# Keys of the Secret. They are also the environment variables that boto3 reads.
S3_CREDENTIAL_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
# Environment variable that passes TrainJobSettings to the train stage.
TRAINJOB_ENV = "SEMISCALE_TRAINJOB"
# Environment variable that passes Supervision to every stage (semiscale/runtime/supervisor.py).
SUPERVISION_ENV = "SEMISCALE_SUPERVISION"
METRICS_PORT = "9090"
# Most installations of Prometheus discover pods by these annotations.
PROMETHEUS_ANNOTATIONS = {
    "prometheus.io/scrape": "true",
    "prometheus.io/port": METRICS_PORT,
}
# GKE adds this taint to GPU nodes by itself.
GPU_TAINT = "nvidia.com/gpu"

# Patterns that texts must match. A refusal states them in words.
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$"
PATTERN_DESCRIPTIONS = {
    QUANTITY_PATTERN: "a quantity of Kubernetes in quotes, such as '8' or '16Gi'",
    NAME_PATTERN: "a name of Kubernetes: at most 63 lower-case letters, digits, hyphens or dots",
}

Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Toleration(_Section):
    """A toleration of Kubernetes. Pods can run on nodes with a matching taint."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


class PodResources(_Section):
    """Resources of one pod. Requests equal limits, so that other pods cannot take them away."""

    cpu: Quantity
    """CPUs of a pod."""
    memory: Quantity
    """Memory of a pod. It includes the content of /dev/shm."""
    gpus: int = Field(default=0, ge=0, le=16)
    """GPUs of a pod. With 0 the stage runs on CPUs."""
    gpu: str = "nvidia.com/gpu"
    """Name of the GPU resource in Kubernetes. Use node_selector to choose the model of the GPU."""
    shared_memory: Quantity | Literal[""] = ""
    """Size of /dev/shm, which counts as memory. Empty: the default of the container runtime, usually 64 MiB."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have, for example cloud.google.com/gke-accelerator: nvidia-h100-80gb."""
    tolerations: list[Toleration] = []
    """Tolerations of the pods."""
    timeout_s: int = Field(ge=60)
    """Seconds after which a stage is considered hung. It is stopped and started again. Finished work is kept."""
    retries: int = Field(default=3, ge=0, le=20)
    """Number of times that a stage is started again inside its pod after a crash, and that Kubeflow is asked to
    replace a lost pod. Each attempt resumes where the last one stopped."""


class Supervision(_Section):
    """How often a stage is started again inside its pod, and how long one attempt may take.

    Attributes:
        restarts: Number of restarts after the first attempt.
        timeout_s: Seconds after which an attempt counts as hung.
    """

    restarts: int
    timeout_s: float


class CpuPodResources(PodResources):
    """Resources of the stages that need no GPU."""

    cpu: Quantity = "8"
    memory: Quantity = "16Gi"
    timeout_s: int = Field(default=12 * HOUR_S, ge=60)


class _GpuMachine(PodResources):
    gpus: int = Field(default=1, ge=0, le=16)
    tolerations: list[Toleration] = [Toleration(key=GPU_TAINT)]


class InferencePodResources(_GpuMachine):
    """Resources of the stages with forward passes only. The CPUs decode the images."""

    cpu: Quantity = "16"
    memory: Quantity = "48Gi"
    shared_memory: Quantity | Literal[""] = "8Gi"
    timeout_s: int = Field(default=72 * HOUR_S, ge=60)
    retries: int = Field(default=10, ge=0, le=20)


class TrainingPodResources(_GpuMachine):
    """Resources of trainings. They apply to each node."""

    cpu: Quantity = "16"
    memory: Quantity = "96Gi"
    shared_memory: Quantity | Literal[""] = "16Gi"
    timeout_s: int = Field(default=14 * 24 * HOUR_S, ge=60)
    nodes: int = Field(default=1, ge=1, le=256)
    """Nodes of a training. Above 1, the stage creates a Kubeflow TrainJob with this number of pods and waits for it."""
    runtime: Name = "torch-distributed"
    """Name of the TrainingRuntime of the TrainJob, which manifests/components/trainjobs installs."""


class Resources(_Section):
    """Resources of the pods on Kubernetes. Runs without Kubernetes ignore them."""

    cpu: CpuPodResources = CpuPodResources()
    """Resources of plan, counts, merge, pack and report."""
    scan: InferencePodResources = InferencePodResources()
    """Resources of score, evaluate and promote."""
    training: TrainingPodResources = TrainingPodResources()
    """Resources of train."""
    queue: Name | Literal[""] = ""
    """Name of the LocalQueue of Kueue. Empty: Kueue is not used."""
    priority: Name | Literal[""] = ""
    """Name of the WorkloadPriorityClass of Kueue. Empty: none is set."""
    secret: Name | Literal[""] = ""
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, for pods without an identity."""


class TrainJobSettings(_Section):
    """Settings of the TrainJob that a training on more than one node creates.

    Attributes:
        image: Container image of the pods.
        machine: Resources of each node.
        queue: LocalQueue of Kueue, or "".
        priority: WorkloadPriorityClass of Kueue, or "".
    """

    image: str
    machine: TrainingPodResources
    queue: str = ""
    priority: str = ""

    def single_device(self) -> "TrainJobSettings":
        """Return a copy with one node and at most one GPU."""
        machine = self.machine.model_copy(update={"nodes": 1, "gpus": min(self.machine.gpus, 1)})
        return self.model_copy(update={"machine": machine})

    def kueue_labels(self) -> dict[str, str]:
        """Return the labels that Kueue needs to admit the job."""
        return kueue_labels(self.queue, self.priority)


def kueue_labels(queue: str, priority: str) -> dict[str, str]:
    """Return the labels that Kueue needs to admit a pod or a job.

    Args:
        queue: LocalQueue of Kueue, or "".
        priority: WorkloadPriorityClass of Kueue, or "".

    Returns:
        Values by label. Labels without a value are left out.
    """
    labels = {"kueue.x-k8s.io/queue-name": queue, "kueue.x-k8s.io/priority-class": priority}
    return {key: value for key, value in labels.items() if value}
