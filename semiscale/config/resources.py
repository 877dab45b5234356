"""Define the `hardware` section of the run file.

It is applied when the pipeline is compiled. The defaults fit the paper's models on pods with one GPU, whose CPUs decode
for it.
"""

import os
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from semiscale.common.errors import AbandonedError, BudgetExceededError, InvalidInputError

HOUR_S = 3600
# Keys of the Secret. They are also the environment variables that boto3 reads.
S3_CREDENTIAL_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
# Environment variable that passes TrainJobSettings to the train stage.
TRAINJOB_ENV = "SEMISCALE_TRAINJOB"
# Environment variable that passes Supervision to every stage (semiscale/runtime/supervisor.py).
SUPERVISION_ENV = "SEMISCALE_SUPERVISION"
# Environment variable that passes IndexedJobSettings to the score stage and the pack stage.
INDEXED_JOB_ENV = "SEMISCALE_INDEXED_JOB"
# Environment variable that tells the counting tasks how scan and packing fan out: `loop` or `job`.
FAN_OUT_ENV = "SEMISCALE_FAN_OUT"
# With more pods, scan and packing are Jobs by default. An iteration of a loop costs 9 kB of the Workflow object, which
# has 1 MiB. Twice 16 pods and three learning rates twice fit (docs/kubeflow.md, "How many pods fit").
MAX_DEFAULT_LOOP_PODS = 16
# Pods of one loop at most. A run that is started in the UI may ask a compiled loop for more.
MAX_LOOP_PODS = 32
# A pod with one of these exit codes ends its Job: a refusal, a spent budget, or nobody who needs the work. All pods
# would end like it.
JOB_ENDING_EXIT_CODES = (
    InvalidInputError.exit_code,
    BudgetExceededError.exit_code,
    AbandonedError.exit_code,
)
# The policies in manifests/ select the pods by this label.
APP_LABELS = {"app.kubernetes.io/part-of": "semiscale"}
# The user that the images run as.
IMAGE_UID = 1000
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

    def toleration_fields(self) -> list[dict[str, str]]:
        """Return the tolerations as Kubernetes has them, without empty fields."""
        return [{k: v for k, v in toleration.model_dump().items() if v} for toleration in self.tolerations]


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
    fan_out: Literal["", "loop", "job"] = ""
    """How Kubeflow starts the pods of scan and packing: `loop` for iterations of a loop, `job` for one Indexed Job of
    Kubernetes, which needs manifests/components/trainjobs. Empty: a Job for more than 16 pods."""


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

    def choose_fan_out(self, pods: int) -> Self:
        """Return a copy in which `scan.fan_out` is chosen.

        Args:
            pods: Largest number of pods of the run.
        """
        chosen = self.scan.fan_out or ("job" if pods > MAX_DEFAULT_LOOP_PODS else "loop")
        return self.model_copy(update={"scan": self.scan.model_copy(update={"fan_out": chosen})})


class JobSettings(_Section):
    """Settings of a job that a task of Kubeflow creates and follows. The task gets them in an environment variable.

    Attributes:
        env: Name of the environment variable.
        image: Container image of the pods.
        queue: LocalQueue of Kueue, or "".
        priority: WorkloadPriorityClass of Kueue, or "".
    """

    env: ClassVar[str]

    image: str
    queue: str = ""
    priority: str = ""

    @classmethod
    def from_env(cls) -> Self | None:
        """Return the settings of this pod, or None if it does its work by itself."""
        settings = os.environ.get(cls.env)
        return cls.model_validate_json(settings) if settings else None

    def kueue_labels(self) -> dict[str, str]:
        """Return the labels that Kueue needs to admit the job."""
        return kueue_labels(self.queue, self.priority)


class TrainJobSettings(JobSettings):
    """Settings of the TrainJob that a training on more than one node creates.

    Attributes:
        machine: Resources of each node.
    """

    env = TRAINJOB_ENV

    machine: TrainingPodResources

    def single_device(self) -> "TrainJobSettings":
        """Return a copy with one node and at most one GPU."""
        machine = self.machine.model_copy(update={"nodes": 1, "gpus": min(self.machine.gpus, 1)})
        return self.model_copy(update={"machine": machine})


class IndexedJobSettings(JobSettings):
    """Settings of the Job that a scan or a packing with many pods creates.

    Attributes:
        machine: Resources of each pod.
        secret: Secret with the keys of the object store, or "".
    """

    env = INDEXED_JOB_ENV

    machine: PodResources
    secret: str = ""


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
