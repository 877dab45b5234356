"""A training on more than one node: this pod creates a Kubeflow TrainJob with its own image, and follows it.

The nodes run the same stage with the same options under torchrun and leave the receipt in the workdir. The TrainJob is
named by the digest of the work, so that a pod that comes back finds it running. https://www.kubeflow.org/docs/components/trainer
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

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
FIELD_MANAGER = "semiscale.trainer/train"  # who asks for the nodes, in the TrainJob
NODE_CONTAINER = "node"  # the replicated job and its container, in every torch runtime of Kubeflow
POLL_INTERVAL_S = 15  # at the log of the first node; the end is told at once, by the watch
TERMINATION_LOG = "/dev/termination-log"  # where Kubernetes looks unless a pod says otherwise
LOG_LINES = 200  # torchrun says a page after the node's own last line
REQUEST_S = 30
API_TIMEOUT_S = 300  # for an API server that does not answer
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def trainjob_settings_from_env() -> TrainJobSettings | None:
    """Return what this pod was told of the nodes that it is to start; None where it trains by itself."""
    told = os.environ.get(TRAINJOB_ENV)
    return TrainJobSettings.model_validate_json(told) if told else None


def run_trainjob(config: TrainConfig, launch: TrainJobSettings) -> None:
    """Have the nodes train, unless the work is finished; returns when its receipt is in the workdir.

    Raises InvalidInputError or SemiscaleError with the failed node's own last line; the failed TrainJob is kept for
    its logs
    until the next try. Raises TerminatedError on SIGTERM, which deletes the TrainJob: its nodes save a checkpoint in
    their
    grace period, and the next try goes on from it.
    """
    receipt = storage.join(config.folder(), "receipt.json")
    if storage.head(receipt) is not None:
        return
    jobs = _TrainJobClient(f"semiscale-{config.digest()}")
    with graceful_stop():
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
            f"{receipt}: The TrainJob is complete and wrote no receipt. Check that its nodes can write there.",
        )


def build_trainjob(config: TrainConfig, launch: TrainJobSettings) -> dict[str, Any]:
    """Return the TrainJob of a training."""
    given = with_workdir_receipts(config).model_dump().items()
    machine = launch.machine
    amount = {"cpu": machine.cpu, "memory": machine.memory} | ({machine.gpu: machine.gpus} if machine.gpus else {})
    trainer = {
        "image": launch.image,
        # Without the dashes torchrun takes --start for an option of its own.
        "command": ["torchrun", "-m", "--", "semiscale.stages.train"],
        "args": [f"--{name.replace('_', '-')}={value}" for name, value in given],
        "numNodes": machine.nodes,
        "numProcPerNode": max(machine.gpus, 1),
        "resourcesPerNode": {"requests": amount, "limits": amount},
        "env": [
            {"name": PORT_ENV, "value": METRICS_PORT},  # the first rank's process offers them, for all
            {"name": SHUTDOWN_TIMEOUT, "value": str(SHUTDOWN_TIMEOUT_S)},
            {
                "name": TERMINATION_LOG_ENV,
                "value": TERMINATION_LOG,
            },  # torchrun ends with 1, whatever the ranks ended with
        ],
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": f"semiscale-{config.digest()}", "labels": {**LABELS, **launch.kueue_labels()}},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": machine.runtime},
            "trainer": trainer,
            **_patches(launch),
        },
    }


LABELS = {"app.kubernetes.io/part-of": "semiscale"}


def _patches(launch: TrainJobSettings) -> dict[str, Any]:
    """Put the nodes' selector, taints and /dev/shm in, and who scrapes them; the runtime has the rest of the pod."""
    machine = launch.machine
    pod: dict[str, Any] = {}
    if machine.node_selector:
        pod["nodeSelector"] = machine.node_selector
    if machine.tolerations:
        pod["tolerations"] = [{k: v for k, v in one.model_dump().items() if v} for one in machine.tolerations]
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
    """One TrainJob on the API server, by its name."""

    def __init__(self, name: str) -> None:
        from kubernetes import client, config  # a second to import, that no other training needs
        from kubernetes.config.config_exception import ConfigException

        try:
            config.load_incluster_config()
        except ConfigException:
            config.load_kube_config(os.environ.get("KUBECONFIG"))  # by default as it was when kfp was imported
        self._name, self._namespace = name, _namespace()
        self._objects, self._pods = client.CustomObjectsApi(), client.CoreV1Api()
        self._place = (GROUP, VERSION, self._namespace, PLURAL)
        self._said = ""

    def create_or_attach(self, job: dict[str, Any]) -> None:
        """Create the TrainJob, or find it; one that ended is left from an earlier try, and is made anew."""
        found = self._find()
        if found is not None and _ended(found):
            self.delete()
            self._until_gone()
            found = None
        if found is None:
            self._create(job)
            nodes = job["spec"]["trainer"]["numNodes"]
            log_info("train", f"TrainJob {self._namespace}/{self._name} created: {nodes} nodes")
        else:
            log_info("train", f"TrainJob {self._namespace}/{self._name} found, it goes on")

    def wait(self) -> None:
        """Wait until the TrainJob is complete, saying what its first node says. Raises what it failed of."""
        for job in self._states():
            ended = _ended(job)
            if ended and ended["type"] == "Failed":
                raise self._failure(ended)
            if ended:
                break
            self._say_progress()
        log_info("train", f"TrainJob {self._name} is complete")

    def delete(self) -> None:
        """Delete the TrainJob and its pods."""
        with _translate_api_errors("delete", fine=404):
            self._objects.delete_namespaced_custom_object(
                *self._place, self._name, propagation_policy="Foreground", _request_timeout=REQUEST_S
            )

    def _create(self, job: dict[str, Any]) -> None:
        with _translate_api_errors("create", fine=409):  # another try of this pod was quicker
            self._objects.create_namespaced_custom_object(*self._place, job, _request_timeout=REQUEST_S)

    def _find(self) -> dict[str, Any] | None:
        with _translate_api_errors("get", fine=404):
            return self._get()
        return None

    def _get(self) -> dict[str, Any]:
        job: dict[str, Any] = self._objects.get_namespaced_custom_object(
            *self._place, self._name, _request_timeout=REQUEST_S
        )
        return job

    def _until_gone(self) -> None:
        for _ in range(API_TIMEOUT_S):
            if self._find() is None:
                return
            time.sleep(1)
        raise SemiscaleError("SEMI-E257", f"TrainJob {self._name}: It has ended and is not deleted. Delete it by hand.")

    def _states(self) -> Iterator[dict[str, Any]]:
        """Yield the TrainJob whenever it changes, and every LOOK_EVERY_S. Rides out an API server that is away."""
        from kubernetes import watch
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        heard = time.monotonic()
        while True:
            try:
                job = self._get()
                heard = time.monotonic()
                yield job
                for event in watch.Watch().stream(
                    self._objects.list_namespaced_custom_object,
                    *self._place,
                    field_selector=f"metadata.name={self._name}",
                    resource_version=job["metadata"].get("resourceVersion"),
                    timeout_seconds=POLL_INTERVAL_S,
                ):
                    yield event["object"]
            except (ApiException, HTTPError) as error:
                if getattr(error, "status", None) == 404:
                    raise SemiscaleError(
                        "SEMI-E258", f"TrainJob {self._name}: It was deleted while it ran. Run the training again."
                    ) from None
                if time.monotonic() - heard > API_TIMEOUT_S:
                    raise SemiscaleError(
                        "SEMI-E259",
                        f"The API server has not answered for {API_TIMEOUT_S} s: {error}. Run the training again.",
                    ) from None
                time.sleep(1)

    def _say_progress(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            first = [pod.metadata.name for pod in self._nodes() if _index(pod) == 0]
            line = parse_log_line(self._last_line(first[-1]))["message"] if first else ""
        except (ApiException, HTTPError):
            return  # the training does not depend on what is said of it
        if line and line != self._said:
            self._said = line
            log_info("train", f"node 0: {line.removeprefix('train · ')}")

    def _failure(self, condition: dict[str, Any]) -> SemiscaleError:
        """Return the error that a node failed with, as if this pod had: its own reason, before its neighbours' echo.

        The reason and its exit code are in the pod's status, where a rank left them; else its log is asked.
        """
        failed = sorted((pod for pod in self._nodes() if _end(pod)), key=lambda pod: _end(pod).finished_at)
        if not failed:
            why = condition.get("message") or condition.get("reason") or "no message"
            return SemiscaleError(
                "SEMI-E260", f"TrainJob {self._name}: It failed: {why}. See its events and the logs of its pods."
            )
        said = [(pod, _end(pod).message or self._last_line(pod.metadata.name)) for pod in failed]
        pod, line = next((pair for pair in said if parse_failure(pair[1])), said[0])
        reported = parse_failure(line) or SemiscaleError(
            "SEMI-E260", parse_log_line(line)["message"] or "The node wrote no reason. See the log of its pod."
        )
        error = type(reported)(
            reported.code, f"{reported.message} ({pod.metadata.name}, exit code {_end(pod).exit_code})"
        )
        error.exit_code = reported.exit_code
        return error

    def _nodes(self) -> list[Any]:
        selector = f"jobset.sigs.k8s.io/jobset-name={self._name}"
        found: list[Any] = self._pods.list_namespaced_pod(
            self._namespace, label_selector=selector, _request_timeout=REQUEST_S
        ).items
        return found

    def _last_line(self, pod: str) -> str:
        """Return the line that tells most of a pod's log: why it stops, or else the last."""
        from kubernetes.client.exceptions import ApiException

        try:
            log = self._pods.read_namespaced_pod_log(
                pod, self._namespace, container=NODE_CONTAINER, tail_lines=LOG_LINES, _request_timeout=REQUEST_S
            )
        except ApiException:  # not started yet, or gone with its machine
            return ""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        reasons = [line for line in lines if parse_failure(line)]
        return str((reasons or lines or [""])[-1])


def _namespace() -> str:
    if NAMESPACE.is_file():
        return NAMESPACE.read_text().strip()
    from kubernetes import config

    return str(config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))[1]["context"].get("namespace", "default"))


def _ended(job: dict[str, Any]) -> dict[str, Any] | None:
    conditions = job.get("status", {}).get("conditions", [])
    ends = [one for one in conditions if one["type"] in ("Complete", "Failed") and one["status"] == "True"]
    return ends[0] if ends else None


def _index(pod: Any) -> int:
    return int((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", -1))


def _end(pod: Any) -> Any:
    """Return how a pod's container ended, if it failed."""
    ends = [one.state.terminated for one in (pod.status.container_statuses or []) if one.name == NODE_CONTAINER]
    return next((end for end in ends if end and end.exit_code), None)


@contextmanager
def _translate_api_errors(verb: str, fine: int | tuple[int, ...] = ()) -> Iterator[None]:
    """Put what the API server refuses in one line; a status that is `fine` ends the block."""
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        if error.status not in (fine if isinstance(fine, tuple) else (fine,)):
            raise _refusal(error, verb) from None


def _refusal(error: Any, verb: str) -> SemiscaleError:
    try:
        why = json.loads(error.body)["message"]
    except (TypeError, ValueError, LookupError):
        why = error.reason
    kind = InvalidInputError if error.status in (400, 403, 404, 422) else SemiscaleError
    hint = " See manifests/components/trainjobs." if error.status in (403, 404) else ""
    return kind("SEMI-E261", f"train: Cannot {verb} the TrainJob: {why} ({error.status}).{hint}")
