"""Train on several nodes: create a Kubeflow TrainJob with this image and watch it.

The nodes run the same stage with the same options under torchrun, and write the receipt to the workdir. The TrainJob is
named by the digest of the work. A restarted pod therefore attaches to the running TrainJob.
See https://www.kubeflow.org/docs/components/trainer.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import TerminatedError, graceful_stop
from semiscale.config.resources import METRICS_PORT, PROMETHEUS_ANNOTATIONS, TRAINJOB_ENV, TrainJobSettings
from semiscale.observability.progress import TERMINATION_LOG_ENV, log_info, parse_failure, parse_log_line
from semiscale.observability.prometheus import PORT_ENV
from semiscale.runtime.stage_config import with_workdir_receipts
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT_S
from semiscale.stages.train.follower import FOLLOWED_ENV, send_heartbeats

LABELS = {"app.kubernetes.io/part-of": "semiscale"}
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
# The manager of the runtime patches in the TrainJob.
FIELD_MANAGER = "semiscale.trainer/train"
# Every torch runtime of Kubeflow gives its replicated job and its container this name.
NODE_CONTAINER = "node"
# The log of the first node is polled. The end of the TrainJob arrives at once, by the watch.
POLL_INTERVAL_S = 15
# The default path at which Kubernetes reads a container's termination message.
TERMINATION_LOG = "/dev/termination-log"
# torchrun writes a page after the last line of the node itself.
LOG_LINES = 200
# Timeout of one request.
REQUEST_S = 30
# An API server that does not answer is asked again for this long.
API_TIMEOUT_S = 300
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def trainjob_settings_from_env() -> TrainJobSettings | None:
    """Return the settings of the TrainJob, or None if this pod trains by itself."""
    settings = os.environ.get(TRAINJOB_ENV)
    return TrainJobSettings.model_validate_json(settings) if settings else None


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
    receipt = storage.join(config.folder(), "receipt.json")
    if storage.head(receipt) is not None:
        return
    jobs = _TrainJobClient(f"semiscale-{config.digest()}")
    with graceful_stop(), send_heartbeats(config.folder()):
        try:
            jobs.create_or_attach(build_trainjob(config, launch))
            jobs.wait()
        except TerminatedError:
            jobs.delete()
            raise
    jobs.delete()
    if storage.head(receipt) is None:
        raise SemiscaleError(
            "SEMI-E256",
            f"{receipt}: is missing, but the TrainJob is complete. Check that its nodes can write to the workdir.",
        )


def build_trainjob(config: TrainConfig, launch: TrainJobSettings) -> dict[str, Any]:
    """Return the TrainJob of a training.

    Args:
        config: The training.
        launch: Machines, image and labels of the TrainJob.
    """
    options = with_workdir_receipts(config).model_dump().items()
    machine = launch.machine
    amount = {"cpu": machine.cpu, "memory": machine.memory} | ({machine.gpu: machine.gpus} if machine.gpus else {})
    trainer = {
        "image": launch.image,
        # Without the dashes, torchrun parses --start as an option of its own.
        "command": ["torchrun", "-m", "--", "semiscale.stages.train"],
        "args": [f"--{name.replace('_', '-')}={value}" for name, value in options],
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
        "metadata": {"name": f"semiscale-{config.digest()}", "labels": {**LABELS, **launch.kueue_labels()}},
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
        pod["tolerations"] = [
            {k: v for k, v in toleration.model_dump().items() if v} for toleration in machine.tolerations
        ]
    if machine.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": machine.shared_memory}
        pod["volumes"] = [{"name": "shared-memory", "emptyDir": memory}]
        mount = {"name": "shared-memory", "mountPath": "/dev/shm"}  # noqa: S108
        pod["containers"] = [{"name": NODE_CONTAINER, "volumeMounts": [mount]}]
    template = {"metadata": {"annotations": PROMETHEUS_ANNOTATIONS}} | ({"spec": pod} if pod else {})
    job = {"name": NODE_CONTAINER, "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [job]}}}
    return {"runtimePatches": [{"manager": FIELD_MANAGER, "trainingRuntimeSpec": patch}]}


class _TrainJobClient:
    """Create, watch and delete the TrainJob of a name on the API server."""

    def __init__(self, name: str) -> None:
        # The import takes a second, which no other training needs.
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        try:
            config.load_incluster_config()
        except ConfigException:
            # The default of this function is the value at the time when kfp was imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"))
        self._name, self._namespace = name, _current_namespace()
        self._objects, self._pods = client.CustomObjectsApi(), client.CoreV1Api()
        self._resource = (GROUP, VERSION, self._namespace, PLURAL)
        self._last_progress = ""

    def create_or_attach(self, job: dict[str, Any]) -> None:
        """Create the TrainJob, or attach to it.

        A TrainJob that ended in an earlier attempt is replaced.
        """
        existing = self._find()
        if existing is not None and _end_condition(existing):
            self.delete()
            self._wait_until_deleted()
            existing = None
        if existing is None:
            self._create(job)
            nodes = job["spec"]["trainer"]["numNodes"]
            log_info("train", f"TrainJob {self._namespace}/{self._name} created: {nodes} nodes")
        else:
            log_info("train", f"TrainJob {self._namespace}/{self._name} found, it goes on")

    def wait(self) -> None:
        """Log the progress of node 0 until the TrainJob is complete.

        Raises:
            SemiscaleError: The TrainJob failed, or was deleted. It has the error of the first failed node.
        """
        for job in self._watch_states():
            end = _end_condition(job)
            if end and end["type"] == "Failed":
                raise self._build_error(end)
            if end:
                break
            self._log_progress()
        log_info("train", f"TrainJob {self._name} is complete")

    def delete(self) -> None:
        """Delete the TrainJob and its pods."""
        with _translate_api_errors("delete", accepted=404):
            self._objects.delete_namespaced_custom_object(
                *self._resource, self._name, propagation_policy="Foreground", _request_timeout=REQUEST_S
            )

    def _create(self, job: dict[str, Any]) -> None:
        # Status 409: another attempt of this pod has created it.
        with _translate_api_errors("create", accepted=409):
            self._objects.create_namespaced_custom_object(*self._resource, job, _request_timeout=REQUEST_S)

    def _find(self) -> dict[str, Any] | None:
        with _translate_api_errors("get", accepted=404):
            return self._get()
        return None

    def _get(self) -> dict[str, Any]:
        job: dict[str, Any] = self._objects.get_namespaced_custom_object(
            *self._resource, self._name, _request_timeout=REQUEST_S
        )
        return job

    def _wait_until_deleted(self) -> None:
        for _ in range(API_TIMEOUT_S):
            if self._find() is None:
                return
            time.sleep(1)
        raise SemiscaleError("SEMI-E257", f"TrainJob {self._name}: has ended but is not deleted. Delete it by hand.")

    def _watch_states(self) -> Iterator[dict[str, Any]]:
        """Yield the TrainJob whenever it changes, and every POLL_INTERVAL_S.

        An API server that does not answer is asked again for API_TIMEOUT_S.
        """
        from kubernetes import watch
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        answered_at = time.monotonic()
        while True:
            try:
                job = self._get()
                answered_at = time.monotonic()
                yield job
                for event in watch.Watch().stream(
                    self._objects.list_namespaced_custom_object,
                    *self._resource,
                    field_selector=f"metadata.name={self._name}",
                    resource_version=job["metadata"].get("resourceVersion"),
                    timeout_seconds=POLL_INTERVAL_S,
                ):
                    yield event["object"]
            except (ApiException, HTTPError) as error:
                if getattr(error, "status", None) == 404:
                    raise SemiscaleError(
                        "SEMI-E258", f"TrainJob {self._name}: was deleted while it ran. Run the training again."
                    ) from None
                if time.monotonic() - answered_at > API_TIMEOUT_S:
                    raise SemiscaleError(
                        "SEMI-E259",
                        f"train: the API server has not answered for {API_TIMEOUT_S} s: {error}. "
                        "Run the training again when it answers.",
                    ) from None
                time.sleep(1)

    def _log_progress(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            pods_of_node_0 = [pod.metadata.name for pod in self._list_node_pods() if _node_rank(pod) == 0]
            line = parse_log_line(self._read_last_line(pods_of_node_0[-1]))["message"] if pods_of_node_0 else ""
        except (ApiException, HTTPError):
            # The training does not depend on its log.
            return
        if line and line != self._last_progress:
            self._last_progress = line
            log_info("train", f"node 0: {line.removeprefix('train · ')}")

    def _build_error(self, condition: dict[str, Any]) -> SemiscaleError:
        """Return the error of the first node that failed by itself.

        Other nodes only fail because of it. A rank leaves the error and its exit code in the pod's status. If the
        status has none, the log is read.
        """
        pods = [pod for pod in self._list_node_pods() if _failed_state(pod)]
        failed = sorted(pods, key=lambda pod: _failed_state(pod).finished_at)
        if not failed:
            reason = condition.get("message") or condition.get("reason") or "no message"
            return SemiscaleError(
                "SEMI-E260", f"TrainJob {self._name}: failed: {reason}. See its events and the logs of its pods."
            )
        lines = [(pod, _failed_state(pod).message or self._read_last_line(pod.metadata.name)) for pod in failed]
        pod, line = next((pair for pair in lines if parse_failure(pair[1])), lines[0])
        cause = parse_failure(line) or SemiscaleError("SEMI-E260", parse_log_line(line)["message"] or "no message")
        exit_code = _failed_state(pod).exit_code
        error = type(cause)(cause.code, f"{cause.message} ({pod.metadata.name}, exit code {exit_code})")
        error.exit_code = cause.exit_code
        return error

    def _list_node_pods(self) -> list[Any]:
        selector = f"jobset.sigs.k8s.io/jobset-name={self._name}"
        pods: list[Any] = self._pods.list_namespaced_pod(
            self._namespace, label_selector=selector, _request_timeout=REQUEST_S
        ).items
        return pods

    def _read_last_line(self, pod: str) -> str:
        """Return the last line of a pod's log that names a failure, or else its last line."""
        from kubernetes.client.exceptions import ApiException

        try:
            log = self._pods.read_namespaced_pod_log(
                pod, self._namespace, container=NODE_CONTAINER, tail_lines=LOG_LINES, _request_timeout=REQUEST_S
            )
        # The pod has not started yet, or has gone with its machine.
        except ApiException:
            return ""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        failures = [line for line in lines if parse_failure(line)]
        return str((failures or lines or [""])[-1])


def _current_namespace() -> str:
    """Return the namespace of this pod, or of the current context of the kubeconfig."""
    if NAMESPACE.is_file():
        return NAMESPACE.read_text().strip()
    from kubernetes import config

    return str(config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))[1]["context"].get("namespace", "default"))


def _end_condition(job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the condition that ended a TrainJob, or None if it is still running."""
    conditions = job.get("status", {}).get("conditions", [])
    ends = [item for item in conditions if item["type"] in ("Complete", "Failed") and item["status"] == "True"]
    return ends[0] if ends else None


def _node_rank(pod: Any) -> int:
    """Return the number of a node, or -1 if the pod does not have one."""
    return int((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", -1))


def _failed_state(pod: Any) -> Any:
    """Return the terminated state of a pod's container, if it failed."""
    ends = [
        status.state.terminated for status in (pod.status.container_statuses or []) if status.name == NODE_CONTAINER
    ]
    return next((end for end in ends if end and end.exit_code), None)


@contextmanager
def _translate_api_errors(verb: str, accepted: int) -> Iterator[None]:
    """Turn an error of the API server into an error of one line.

    The status `accepted` is no error.
    """
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        if error.status != accepted:
            raise _to_semiscale_error(error, verb) from None


def _to_semiscale_error(error: Any, verb: str) -> SemiscaleError:
    try:
        reason = json.loads(error.body)["message"]
    except (TypeError, ValueError, LookupError):
        reason = error.reason
    error_type = InvalidInputError if error.status in (400, 403, 404, 422) else SemiscaleError
    hint = " See manifests/components/trainjobs." if error.status in (403, 404) else ""
    return error_type("SEMI-E261", f"train: cannot {verb} the TrainJob: {reason} ({error.status}).{hint}")
