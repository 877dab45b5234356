"""Define the `hardware` section of the run file.

It is applied when the pipeline is compiled. The defaults fit the paper's models on one GPU a pod, whose CPUs decode
for that GPU.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

HOUR_S = 3600
S3_CREDENTIAL_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")  # of the secret, and of boto3
TRAINJOB_ENV = "SEMISCALE_TRAINJOB"  # the environment variable that brings a Launch to the stage
METRICS_PORT = "9090"
PROMETHEUS_ANNOTATIONS = {
    "prometheus.io/scrape": "true",
    "prometheus.io/port": METRICS_PORT,
}  # what most Prometheus set-ups look for
GPU_TAINT = "nvidia.com/gpu"  # what GPU node pools are tainted with, on GKE by itself

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Toleration(_Section):
    """A taint that the pods may run in spite of; the words are those of Kubernetes."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


class PodResources(_Section):
    """What one pod of a kind of stages gets. Requests equal limits, so that a pod has what was planned for it."""

    cpu: Quantity
    """CPUs."""
    memory: Quantity
    """Memory, with what is in /dev/shm."""
    gpus: int = Field(default=0, ge=0, le=16)
    """GPUs of a pod; 0 runs the stage on CPUs."""
    gpu: str = "nvidia.com/gpu"
    """The resource that a GPU is asked for by; which card it is, node_selector says."""
    shared_memory: Quantity | Literal[""] = ""
    """Size of /dev/shm, in memory. Empty: what the container runtime gives, mostly 64 MiB."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes, for example cloud.google.com/gke-accelerator: nvidia-h100-80gb."""
    tolerations: list[Toleration] = []
    """Taints that the pods may run in spite of."""
    timeout_s: int = Field(ge=60)
    """A pod that runs for longer is taken for hung and ended. What it finished is kept."""
    retries: int = Field(default=3, ge=0, le=20)
    """Times that a failed pod is started again; it goes on where the last one stopped."""


class CpuPodResources(PodResources):
    """For plan, counts, merge, pack and report."""

    cpu: Quantity = "8"
    memory: Quantity = "16Gi"
    timeout_s: int = Field(default=12 * HOUR_S, ge=60)


class _GpuMachine(PodResources):
    gpus: int = Field(default=1, ge=0, le=16)
    tolerations: list[Toleration] = [Toleration(key=GPU_TAINT)]


class InferencePodResources(_GpuMachine):
    """For the pods that score the pool, evaluate, promote: forward passes only. Decoding is what the CPUs are for."""

    cpu: Quantity = "16"
    memory: Quantity = "48Gi"
    shared_memory: Quantity | Literal[""] = "8Gi"
    timeout_s: int = Field(default=72 * HOUR_S, ge=60)
    retries: int = Field(default=10, ge=0, le=20)


class TrainingPodResources(_GpuMachine):
    """For the trainings; with more than one node, of each node."""

    cpu: Quantity = "16"
    memory: Quantity = "96Gi"
    shared_memory: Quantity | Literal[""] = "16Gi"
    timeout_s: int = Field(default=14 * 24 * HOUR_S, ge=60)
    nodes: int = Field(default=1, ge=1, le=256)
    """Above 1, the stage creates a Kubeflow TrainJob of as many pods and follows it."""
    runtime: Name = "torch-distributed"
    """The TrainingRuntime of such a TrainJob; manifests/components/trainjobs has it."""


class Resources(_Section):
    """Where the stages run, one entry a kind of stages. On one machine without Kubernetes all of it is ignored."""

    cpu: CpuPodResources = CpuPodResources()
    """plan, counts, merge, pack, report"""
    scan: InferencePodResources = InferencePodResources()
    """score, evaluate, promote"""
    training: TrainingPodResources = TrainingPodResources()
    """train"""
    queue: Name | Literal[""] = ""
    """Kueue's LocalQueue, where the cluster has Kueue."""
    priority: Name | Literal[""] = ""
    """Kueue's WorkloadPriorityClass, where the cluster has Kueue."""
    secret: Name | Literal[""] = ""
    """A Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, where pods have no identity."""


RESOURCE_KEYS = (*Resources.model_fields, *TrainingPodResources.model_fields)


class TrainJobSettings(_Section):
    """What a training on more than one node needs to know of its hardware: it creates the pods itself."""

    image: str
    machine: TrainingPodResources
    queue: str = ""
    priority: str = ""

    def single_device(self) -> "TrainJobSettings":
        """Return what asks for one node and one of its GPUs."""
        machine = self.machine.model_copy(update={"nodes": 1, "gpus": min(self.machine.gpus, 1)})
        return self.model_copy(update={"machine": machine})

    def kueue_labels(self) -> dict[str, str]:
        """Return the labels by which Kueue admits a job."""
        return kueue_labels(self.queue, self.priority)


def kueue_labels(queue: str, priority: str) -> dict[str, str]:
    """Return the labels by which Kueue admits a pod or a job; none where there is no queue."""
    labels = {"kueue.x-k8s.io/queue-name": queue, "kueue.x-k8s.io/priority-class": priority}
    return {key: value for key, value in labels.items() if value}
