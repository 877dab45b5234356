"""Run the pods of Jobs as processes of this machine, and report their states to a Kubernetes API server.

This stands in for a scheduler and a kubelet. The real Job controller creates, replaces and deletes the pods.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from semiscale.observability.progress import TERMINATION_LOG_ENV
from semiscale.observability.prometheus import PORT_ENV
from tests.support.api_server import ApiServer

POLL_INTERVAL_S = 0.2
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
# A reference to a variable in a command, and an escaped dollar sign.
REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][\w.-]*)\)")
FIELD = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class PodProcess:
    """The process of a pod.

    Attributes:
        name: Name of the pod.
        index: Number of the pod in its Job.
        process: The process of its container.
        log: File of the output.
        is_reported: Whether the API server knows its end.
    """

    def __init__(self, pod: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        metadata, (container,) = pod["metadata"], pod["spec"]["containers"]
        self.name, self.index = metadata["name"], int(metadata["labels"][INDEX_LABEL])
        self.log, self._message = folder / f"{self.name}.log", folder / f"{self.name}.message"
        self.is_reported = False
        self._container, self._started_at = container, now()
        self._grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        self._kill_at: float | None = None
        variables = {item["name"]: _value(item, metadata) for item in container["env"]}
        # The pods share the ports of this machine, and have no volume of their own for the message.
        overridden = {TERMINATION_LOG_ENV: str(self._message), PORT_ENV: ""}
        command = [_expand(part, variables) for part in (*container["command"], *container["args"])]
        self._message.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable if command[0] == "python" else command[0], *command[1:]],
                env={**os.environ, **variables, **overridden, **env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill all processes of the pod."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace period."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
            self.process.terminate()
        elif time.monotonic() > self._kill_at:
            self.kill()

    def status(self) -> dict[str, Any]:
        """Return the status of the pod as a kubelet reports it."""
        code = self.process.poll()
        state: dict[str, Any]
        if code is None:
            phase, state = "Running", {"running": {"startedAt": self._started_at}}
        else:
            phase = "Failed" if code else "Succeeded"
            terminated = {
                "exitCode": code if code >= 0 else 128 - code,
                "reason": "Error" if code else "Completed",
                "message": self._message.read_text(),
                "startedAt": self._started_at,
                "finishedAt": now(),
            }
            state = {"terminated": terminated}
        container = {
            "name": self._container["name"],
            "image": self._container["image"],
            "imageID": "",
            "ready": code is None,
            "restartCount": 0,
            "state": state,
        }
        return {"phase": phase, "containerStatuses": [container]}


class Kubelet:
    """Runs every pod of a Job in a namespace as a process.

    Args:
        server: The API server.
        namespace: Namespace of the pods.
        folder: Folder of the logs.
        env: Environment variables of all pods.
    """

    def __init__(self, server: ApiServer, namespace: str, folder: Path, env: dict[str, str]) -> None:
        self._server, self._folder, self._env = server, folder, env
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        # By uid. A pod stays here after its end.
        self._started: dict[str, PodProcess] = {}

    def pods(self) -> list[PodProcess]:
        """Return all pods that were started, in the order of their starts."""
        return list(self._started.values())

    def kill_all(self) -> None:
        """Kill the processes of all pods."""
        for pod in self.pods():
            pod.kill()
            pod.process.wait()

    def sync(self) -> None:
        """Start new pods, stop deleted ones, and report what has changed."""
        pods = self._server.request("GET", f"{self._path}?labelSelector=batch.kubernetes.io/job-name")["items"]
        for pod in pods:
            # The Job controller or the garbage collector removed the pod after it was listed.
            try:
                self._sync_pod(pod)
            except HTTPError as error:
                if error.code != 404:
                    raise
        for uid in self._started.keys() - {pod["metadata"]["uid"] for pod in pods}:
            self._started[uid].kill()

    def _sync_pod(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        uid, path, is_deleted = metadata["uid"], f"{self._path}/{metadata['name']}", "deletionTimestamp" in metadata
        started = self._started.get(uid)
        if started is None:
            if not is_deleted:
                # Kubernetes deletes a pod without a node at once.
                node = {"apiVersion": "v1", "kind": "Node", "name": "test"}
                self._server.request(
                    "POST", f"{path}/binding", {"metadata": {"name": metadata["name"]}, "target": node}
                )
                self._started[uid] = PodProcess(pod, self._folder, self._env)
                self._report(path, self._started[uid])
            return
        if started.process.poll() is None:
            if is_deleted:
                started.stop()
            return
        if not started.is_reported:
            self._report(path, started)
            started.is_reported = True
        if is_deleted:
            self._server.request("DELETE", f"{path}?gracePeriodSeconds=0")

    def _report(self, path: str, pod: PodProcess) -> None:
        self._server.request(
            "PATCH", f"{path}/status", {"status": pod.status()}, "application/strategic-merge-patch+json"
        )


@contextmanager
def run_kubelet(server: ApiServer, namespace: str, folder: Path, env: dict[str, str]) -> Iterator[Kubelet]:
    """Run the pods of Jobs in a thread until the block ends. They are killed at its end."""
    kubelet, ended, errors = Kubelet(server, namespace, folder, env), threading.Event(), list[BaseException]()

    def repeat() -> None:
        try:
            while not ended.wait(POLL_INTERVAL_S):
                kubelet.sync()
        # The thread of the test raises it.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True, name="kubelet")
    thread.start()
    try:
        yield kubelet
    finally:
        ended.set()
        thread.join()
        kubelet.kill_all()
        if errors:
            raise errors[0]


def now() -> str:
    """Return the time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _value(variable: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Return the value of a container's variable."""
    if "valueFrom" not in variable:
        return str(variable.get("value", ""))
    match = FIELD.fullmatch(variable["valueFrom"]["fieldRef"]["fieldPath"])
    assert match, variable
    return str(metadata[match[1]][match[2]])


def _expand(text: str, variables: dict[str, str]) -> str:
    """Replace the references to variables as Kubernetes does in commands."""
    return REFERENCE.sub(lambda match: variables.get(match[1], match[0]) if match[1] else "$", text)
