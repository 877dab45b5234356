"""Serve a stand-in for the Kubernetes API of one namespace, over real HTTP.

It has TrainJobs (create, get, watch, delete), pods by label, and their logs, in the format of the Kubernetes API. It
allows the requests that manifests/components/trainjobs allows. There is no controller. A test ends a TrainJob with
`end`.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainjobs"
PODS = "/api/v1/namespaces/lab/pods"
ROLE = Path(__file__).resolve().parents[2] / "manifests" / "components" / "trainjobs" / "role.yaml"
# Pairs of resource and verb.
RIGHTS = {
    (resource, verb)
    for rule in next(yaml.safe_load_all(ROLE.read_text()))["rules"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
}


class Cluster:
    """The state of the cluster: TrainJobs by name, pods with their logs, and requests."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.requests: list[str] = []
        # The rights that requests needed.
        self.used: set[tuple[str, str]] = set()
        # The number of next requests that are refused, and the status of the answer.
        self.refusing, self.refusal = 0, 503
        self._version = 0

    def clear(self) -> None:
        """Reset the cluster to its first state."""
        for container in (self.jobs, self.pods, self.logs, self.requests, self.used):
            container.clear()
        self.refusing, self.refusal = 0, 503
        self._version = 0

    def put(self, job: dict[str, Any]) -> dict[str, Any]:
        """Store a TrainJob under a new version."""
        with self.changed:
            self._version += 1
            metadata = {**job["metadata"], "resourceVersion": str(self._version)}
            self.jobs[metadata["name"]] = {**job, "metadata": metadata}
            self.changed.notify_all()
        return self.jobs[metadata["name"]]

    def wait_until_created(self, count: int = 1, timeout_s: float = 120) -> str:
        """Wait until a number of TrainJobs were created, and return the name of one."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.requests.count(f"POST {JOBS}") >= count, timeout_s)
            assert self.changed.wait_for(lambda: bool(self.jobs), timeout_s)
        return next(iter(self.jobs))

    def end(self, name: str, kind: str, message: str = "") -> None:
        """End a TrainJob with a condition: Complete or Failed."""
        condition = {"type": kind, "status": "True", "message": message, "reason": kind}
        self.put({**self.jobs[name], "status": {"conditions": [condition]}})

    def add_pod(
        self, job: str, index: int, log: str, exit_code: int | None = None, finished: int = 0, message: str = ""
    ) -> None:
        """Add the pod of a node with its log.

        The pod runs if it has no exit code. A message stands in its status.
        """
        name = f"{job}-node-0-{index}"
        state: dict[str, Any] = {"running": {}}
        if exit_code is not None:
            terminated = {"exitCode": exit_code, "finishedAt": f"2026-01-01T00:00:{finished:02}Z"}
            state = {"terminated": terminated | ({"message": message} if message else {})}
        status = {"name": "node", "image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": state}
        metadata = {
            "name": name,
            "labels": {"jobset.sigs.k8s.io/jobset-name": job},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        }
        self.logs[name] = log
        self.pods.append({"metadata": metadata, "status": {"containerStatuses": [status]}})


@contextmanager
def serve_cluster(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """Serve a cluster, and yield its state and the path of its kubeconfig."""
    cluster = Cluster()
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cluster, _write_kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _write_kubeconfig(path: Path, address: str) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "lab"}}],
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        if self._refuse():
            return
        path, query = self._record_request()
        name = path.removeprefix(JOBS).strip("/")
        if path == JOBS and query.get("watch"):
            self._watch(query["fieldSelector"].removeprefix("metadata.name="), query)
        elif path == PODS:
            label = query["labelSelector"].partition("=")[2]
            pods = [pod for pod in self.cluster.pods if label in pod["metadata"]["labels"].values()]
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": pods})
        elif path.startswith(PODS) and path.endswith("/log"):
            lines = self.cluster.logs[path.split("/")[-2]].splitlines()[-int(query["tailLines"]) :]
            self._send(200, "\n".join(lines).encode(), "text/plain")
        elif name in self.cluster.jobs:
            self._answer(200, self.cluster.jobs[name])
        else:
            self._status(404, f'trainjobs "{name}" not found')

    def do_POST(self) -> None:
        if self._refuse():
            return
        path, _ = self._record_request()
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if job["metadata"]["name"] in self.cluster.jobs:
            self._status(409, "already exists")
            return
        self._answer(201, self.cluster.put(job))
        assert path == JOBS

    def do_DELETE(self) -> None:
        if self._refuse():
            return
        path, _ = self._record_request()
        with self.cluster.changed:
            job = self.cluster.jobs.pop(path.rpartition("/")[2], None)
            self.cluster.changed.notify_all()
        self._answer(200 if job else 404, {"kind": "Status", "apiVersion": "v1"})

    def _record_request(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        self.cluster.requests.append(f"{self.command} {parts.path}")
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _needed_right(self) -> tuple[str, str]:
        """Return the right that a request needs.

        https://kubernetes.io/docs/reference/access-authn-authz/authorization
        """
        parts = urlsplit(self.path)
        is_collection = parts.path in (JOBS, PODS)
        resource = "trainjobs" if parts.path.startswith(JOBS) else "pods/log" if parts.path.endswith("/log") else "pods"
        read_verb = "watch" if "watch" in parse_qs(parts.query) else "list" if is_collection else "get"
        return resource, {"POST": "create", "DELETE": "delete"}.get(self.command, read_verb)

    def _refuse(self) -> bool:
        """Answer a request that is forbidden or refused, and return whether it was."""
        right = self._needed_right()
        self.cluster.used.add(right)
        if right not in RIGHTS:
            self._status(403, f"cannot {right[1]} {right[0]}")
            return True
        if self.cluster.refusing > 0:
            self.cluster.refusing -= 1
            self._status(self.cluster.refusal, "not now")
            return True
        return False

    def _watch(self, name: str, query: dict[str, str]) -> None:
        """Send the TrainJob at each change, until the timeout of the client."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        seen_version, until = query.get("resourceVersion"), time.monotonic() + int(query["timeoutSeconds"])

        def has_changed() -> bool:
            job = self.cluster.jobs.get(name)
            return job is not None and job["metadata"]["resourceVersion"] != seen_version

        while (left_s := until - time.monotonic()) > 0:
            with self.cluster.changed:
                if not self.cluster.changed.wait_for(has_changed, left_s):
                    return
                job = self.cluster.jobs[name]
            seen_version = job["metadata"]["resourceVersion"]
            self.wfile.write(json.dumps({"type": "MODIFIED", "object": job}).encode() + b"\n")

    def _status(self, code: int, message: str) -> None:
        self._answer(
            code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
        )

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        self._send(code, json.dumps(content).encode(), "application/json")

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing. The tests read `requests`."""
