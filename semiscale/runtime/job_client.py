"""Create, follow and delete a job of Kubernetes: a TrainJob of Kubeflow or a Job.

A job is named by its work. A restarted pod therefore attaches to the job that runs.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import TerminatedError, graceful_stop
from semiscale.config.resources import JOB_ENDING_EXIT_CODES
from semiscale.observability.progress import log_info, parse_failure, parse_log_line
from semiscale.runtime.follower import send_heartbeats
from semiscale.runtime.stage_config import StageConfig, with_workdir_receipts

# The log of the first pod is polled. The end of the job arrives at once, by the watch.
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
# Kubeflow Pipelines sets it. A host name is cut after 63 characters.
POD_NAME_ENV = "KFP_POD_NAME"
DELETED_ID = "SEMI-E258"


@dataclass(frozen=True)
class JobKind:
    """A kind of job, and how to find its pods.

    Attributes:
        stage: Name of the stage in log lines and errors.
        kind: Kind of the job.
        group: API group of the kind.
        version: Version of the API group.
        plural: Plural name of the kind in the API.
        pod: Noun for a pod of the job in log lines.
        container: Name of the pods' container.
        name_label: Label of the pods with the name of the job.
        first_pod_labels: Label selector for pods that may have index 0.
    """

    stage: str
    kind: str
    group: str
    version: str
    plural: str
    pod: str
    container: str
    name_label: str
    first_pod_labels: str = ""


class JobClient:
    """Creates, watches and deletes the job of a name on the API server.

    Args:
        kind: Kind of the job.
        name: Name of the job.
    """

    def __init__(self, kind: JobKind, name: str) -> None:
        # The import takes a second, which no other work needs.
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        try:
            config.load_incluster_config()
        except ConfigException:
            # The default of this function is the value at the time when kfp was imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"))
        self._kind, self._name, self._namespace = kind, name, _current_namespace()
        self._objects, self._pods = client.CustomObjectsApi(), client.CoreV1Api()
        self._resource = (kind.group, kind.version, self._namespace, kind.plural)
        self._last_progress = ""

    @contextmanager
    def followed(self, folder: str) -> Iterator[None]:
        """Send heartbeats to the job's pods inside the block, and delete the job after it.

        A job that failed is kept for its logs until the next attempt.

        Args:
            folder: URI of the work's folder.

        Raises:
            TerminatedError: SIGTERM arrived. The job is deleted, and its pods save their work in their grace period.
        """
        with graceful_stop(), send_heartbeats(folder, self._kind.stage):
            try:
                yield
            except TerminatedError:
                self.delete()
                raise
        self.delete()

    def create_or_attach(self, job: dict[str, Any], size: str) -> bool:
        """Create the job, or attach to it.

        A job that ended in an earlier attempt is replaced.

        Args:
            job: The job.
            size: Number of its pods, for the log.

        Returns:
            Whether the job was created.
        """
        existing = self._find()
        if existing is not None and (end_condition(existing) or "deletionTimestamp" in existing["metadata"]):
            self.delete()
            self._wait_until_deleted()
            existing = None
        if existing is None:
            self._create(job)
            self._log(f"{self._kind.kind} {self._namespace}/{self._name} created: {size}")
        else:
            self._log(f"{self._kind.kind} {self._namespace}/{self._name} found, it goes on")
        return existing is None

    def delete(self) -> None:
        """Delete the job and its pods."""
        with self._translate_api_errors("delete", accepted=404):
            self._objects.delete_namespaced_custom_object(
                *self._resource, self._name, propagation_policy="Foreground", _request_timeout=REQUEST_S
            )

    def _create(self, job: dict[str, Any]) -> None:
        # Status 409: another attempt of this pod has created it.
        with self._translate_api_errors("create", accepted=409):
            self._objects.create_namespaced_custom_object(*self._resource, job, _request_timeout=REQUEST_S)

    def _find(self) -> dict[str, Any] | None:
        with self._translate_api_errors("get", accepted=404):
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
        raise SemiscaleError(
            "SEMI-E257", f"{self._kind.kind} {self._name}: has ended but is not deleted. Delete it by hand."
        )

    def watch_states(self) -> Iterator[dict[str, Any]]:
        """Yield the job whenever it changes, and every POLL_INTERVAL_S.

        An API server that does not answer is asked again for API_TIMEOUT_S.

        Raises:
            SemiscaleError: The job was deleted (SEMI-E258), or the API server does not answer.
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
                        DELETED_ID,
                        f"{self._kind.kind} {self._name}: was deleted while it ran. Run the {self._kind.stage} stage "
                        "again.",
                    ) from None
                if time.monotonic() - answered_at > API_TIMEOUT_S:
                    raise SemiscaleError(
                        "SEMI-E259",
                        f"{self._kind.stage}: the API server has not answered for {API_TIMEOUT_S} s: {error}. "
                        "Run the stage again when it answers.",
                    ) from None
                time.sleep(1)

    def log_progress(self) -> None:
        """Log the last line of the first pod, if it is new."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            first_pods = [pod for pod in self._list_pods(self._kind.first_pod_labels) if _pod_index(pod) == 0]
            line = parse_log_line(self._read_last_line(first_pods[-1].metadata.name))["message"] if first_pods else ""
        except (ApiException, HTTPError):
            # The work does not depend on its log.
            return
        if line and line != self._last_progress:
            self._last_progress = line
            self._log(f"{self._kind.pod} 0: {line.removeprefix(f'{self._kind.stage} · ')}")

    def build_error(self, condition: dict[str, Any]) -> SemiscaleError:
        """Return the error of the first pod that failed by itself.

        Args:
            condition: The condition that ended the job.
        """
        if failure := self.find_failure():
            return failure
        reason = condition.get("message") or condition.get("reason") or "no message"
        return SemiscaleError(
            "SEMI-E260", f"{self._kind.kind} {self._name}: failed: {reason}. See its events and the logs of its pods."
        )

    def find_failure(self, labels: str = "") -> SemiscaleError | None:
        """Return the error of the first pod that failed by itself, or None if no pod failed.

        Other pods may only fail because of it. A process leaves the error and its exit code in the pod's status. If the
        status has none, the log is read. A pod whose exit code ends a Job comes before pods that the Job replaced.

        Args:
            labels: Label selector that limits the pods.
        """
        failed = [pod for pod in self._list_pods(labels) if self._failed_state(pod)]
        failed.sort(key=lambda pod: (not self._ends_job(pod), self._failed_state(pod).finished_at))
        if not failed:
            return None
        lines = [(pod, self._failed_state(pod).message or self._read_last_line(pod.metadata.name)) for pod in failed]
        pod, line = next((pair for pair in lines if parse_failure(pair[1])), lines[0])
        cause = parse_failure(line) or SemiscaleError("SEMI-E260", parse_log_line(line)["message"] or "no message")
        exit_code = self._failed_state(pod).exit_code
        error = type(cause)(cause.code, f"{cause.message} ({pod.metadata.name}, exit code {exit_code})")
        error.exit_code = cause.exit_code
        return error

    def own_pod(self) -> Any:
        """Return the pod that this process runs in.

        Raises:
            SemiscaleError: The API server knows no such pod.
        """
        name = os.environ.get(POD_NAME_ENV) or socket.gethostname()
        # A name is selected from a list, because a stage may list pods and not get them.
        with self._translate_api_errors("list the pods of"):
            pods = self._pods.list_namespaced_pod(
                self._namespace, field_selector=f"metadata.name={name}", _request_timeout=REQUEST_S
            ).items
        if not pods:
            raise SemiscaleError(
                "SEMI-E262",
                f"{self._kind.stage}: pod {self._namespace}/{name} is not on the API server, so that the service "
                f"account of the {self._kind.kind} is not known. Set {POD_NAME_ENV} to the name of this pod.",
            )
        return pods[0]

    def _list_pods(self, more_labels: str = "") -> list[Any]:
        selector = f"{self._kind.name_label}={self._name}" + (f",{more_labels}" if more_labels else "")
        pods: list[Any] = self._pods.list_namespaced_pod(
            self._namespace, label_selector=selector, _request_timeout=REQUEST_S
        ).items
        return pods

    def _failed_state(self, pod: Any) -> Any:
        """Return the terminated state of a pod's container, if it failed."""
        statuses = pod.status.container_statuses or []
        ends = [status.state.terminated for status in statuses if status.name == self._kind.container]
        return next((end for end in ends if end and end.exit_code), None)

    def _ends_job(self, pod: Any) -> bool:
        return self._failed_state(pod).exit_code in JOB_ENDING_EXIT_CODES

    def _read_last_line(self, pod: str) -> str:
        """Return the last line of a pod's log that names a failure, or else its last line."""
        from kubernetes.client.exceptions import ApiException

        try:
            log = self._pods.read_namespaced_pod_log(
                pod, self._namespace, container=self._kind.container, tail_lines=LOG_LINES, _request_timeout=REQUEST_S
            )
        # The pod has not started yet, or has gone with its machine.
        except ApiException:
            return ""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        failures = [line for line in lines if parse_failure(line)]
        return str((failures or lines or [""])[-1])

    def _log(self, text: str) -> None:
        log_info(self._kind.stage, text)

    @contextmanager
    def _translate_api_errors(self, verb: str, accepted: int = 0) -> Iterator[None]:
        """Turn an error of the API server into an error of one line.

        The status `accepted` is no error.
        """
        from kubernetes.client.exceptions import ApiException

        try:
            yield
        except ApiException as error:
            if error.status != accepted:
                raise self._to_semiscale_error(error, verb) from None

    def _to_semiscale_error(self, error: Any, verb: str) -> SemiscaleError:
        try:
            reason = json.loads(error.body)["message"]
        except (TypeError, ValueError, LookupError):
            reason = error.reason
        error_type = InvalidInputError if error.status in (400, 403, 404, 422) else SemiscaleError
        hint = " See manifests/components/trainjobs." if error.status in (403, 404) else ""
        kind = self._kind
        return error_type("SEMI-E261", f"{kind.stage}: cannot {verb} the {kind.kind}: {reason} ({error.status}).{hint}")


def end_condition(job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the condition that ended a job, or None if it is still running."""
    conditions = job.get("status", {}).get("conditions", [])
    ends = [item for item in conditions if item["type"] in ("Complete", "Failed") and item["status"] == "True"]
    return ends[0] if ends else None


def stage_options(config: StageConfig, **replaced: str) -> list[str]:
    """Return the options of a stage's command line in a pod of a job.

    Receipts are named by their URIs in the workdir, because the pods of a job have no copies of artifacts.

    Args:
        config: Config of the stage.
        **replaced: Options with values that Kubernetes expands, by the names of their fields.
    """
    # Kubernetes replaces $(NAME) in arguments. It writes $$ as $.
    values = {name: str(value).replace("$", "$$") for name, value in with_workdir_receipts(config).model_dump().items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**values, **replaced}.items()]


def _current_namespace() -> str:
    """Return the namespace of this pod, or of the current context of the kubeconfig."""
    if NAMESPACE.is_file():
        return NAMESPACE.read_text().strip()
    from kubernetes import config

    return str(config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))[1]["context"].get("namespace", "default"))


def _pod_index(pod: Any) -> int:
    """Return the index of a pod in its job, or -1 if the pod does not have one."""
    return int((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", -1))
