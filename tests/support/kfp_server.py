"""Serve a stand-in for Kubeflow Pipelines over HTTP.

It has the part of the REST API (v2beta1) that the verbs use, with its rules. They are filters on the display name,
pages of at most `page_size`, unique names, a concurrency of 1 to 10, and cron expressions of six fields.
https://www.kubeflow.org/docs/components/pipelines/reference/api/kubeflow-pipeline-api-spec/
"""

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Resource = dict[str, Any]
API = "/apis/v2beta1"
IDS = {
    "pipelines": "pipeline_id",
    "versions": "pipeline_version_id",
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurringruns": "recurring_run_id",
}
FIELDS = {"versions": "pipeline_versions", "recurringruns": "recurringRuns"}
NOT_FOUND, INVALID, EXISTS = (404, 5), (400, 3), (409, 6)
# An operation of the enumeration. Clients write its number or its name.
EQUALS = 1


class ProblemError(Exception):
    """An error answer with its HTTP status and its gRPC code."""

    def __init__(self, status: tuple[int, int], message: str) -> None:
        super().__init__(message)
        self.status, self.code = status


class KubeflowPipelines:
    """The state of the server."""

    def __init__(self) -> None:
        self.resources: dict[str, list[Resource]] = {kind: [] for kind in IDS}
        self.authorizations: set[str] = set()
        self.forbidden = False
        # If it is set, a proxy before the server answers this page, for example a login.
        self.page = b""
        # The server may return smaller pages than the client asks for.
        self.page_size = 2

    def names(self, kind: str) -> list[str]:
        """Return the names of all resources of a kind."""
        return [resource["display_name"] for resource in self.resources[kind]]

    def answer(self, method: str, path: str, query: dict[str, str], body: Resource) -> Resource:
        """Answer a request."""
        if self.forbidden:
            raise ProblemError((403, 7), "User 'a' is not authorized with reason: no role binding")
        parts = path.removeprefix(API).strip("/").split("/")
        if parts == ["healthz"]:
            return {"multi_user": False}
        if parts[0] == "pipelines" and parts[-1] in ("upload", "upload_version"):
            return self._upload(parts[-1], query, body)
        kind = "versions" if parts[-1] == "versions" else parts[0]
        if method == "GET" and len(parts) in (1, 3):
            return self._page(kind, parts, query)
        if method == "POST" and len(parts) == 1:
            return self._create(kind, body)
        return self._act(method, kind, *parts[1].partition(":")[::2])

    def _upload(self, method: str, query: dict[str, str], body: Resource) -> Resource:
        kind = "pipelines" if method == "upload" else "versions"
        parent = {"pipeline_id": query["pipelineid"]} if kind == "versions" else {}
        siblings = [resource for resource in self.resources[kind] if parent.items() <= resource.items()]
        if query["name"] in [resource["display_name"] for resource in siblings]:
            raise ProblemError(EXISTS, f"Failed to create a new {kind}: the name {query['name']} already exist")
        return self._add(kind, {"display_name": query["name"], **parent, "pipeline_spec": body["file"]})

    def _create(self, kind: str, body: Resource) -> Resource:
        if kind in ("runs", "recurringruns"):
            version = body["pipeline_version_reference"]["pipeline_version_id"]
            self._find("versions", version)
            self._find("experiments", body["experiment_id"])
        if kind == "recurringruns":
            if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
                raise ProblemError(INVALID, "The max concurrency of the recurring run must be between 1 and 10")
            if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                raise ProblemError(INVALID, "Expected exactly 6 fields in the cron expression")
            # An int64 is text in JSON.
            body["max_concurrency"] = str(body["max_concurrency"])
        # This is the server's default in an installation for one user.
        if kind in ("runs", "recurringruns"):
            body["service_account"] = body.get("service_account") or "pipeline-runner"
        return self._add(kind, {**body, **({"state": "RUNNING"} if kind == "runs" else {})})

    def _act(self, method: str, kind: str, identity: str, verb: str) -> Resource:
        resource = self._find(kind, identity)
        if method == "DELETE":
            self.resources[kind].remove(resource)
        elif verb == "terminate":
            resource["state"] = "CANCELING"
        return resource if method == "GET" else {}

    def _page(self, kind: str, parts: list[str], query: dict[str, str]) -> Resource:
        matches = self.resources[kind]
        if len(parts) == 3:
            matches = [resource for resource in matches if resource["pipeline_id"] == parts[1]]
        if "experiment_id" in query:
            matches = [resource for resource in matches if resource["experiment_id"] == query["experiment_id"]]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert predicate["operation"] in (EQUALS, "EQUALS")
            assert predicate["key"] == "display_name"
            matches = [resource for resource in matches if resource["display_name"] == predicate["stringValue"]]
        # New resources are added at the end.
        if query.get("sort_by") == "created_at desc":
            matches = matches[::-1]
        start = int(query.get("page_token") or 0)
        size = min(int(query.get("page_size") or 20), self.page_size)
        more = {"next_page_token": str(start + size)} if start + size < len(matches) else {}
        # The gateway of the server leaves out empty fields.
        return {**({FIELDS.get(kind, kind): matches[start : start + size]} if matches else {}), **more}

    def _add(self, kind: str, resource: Resource) -> Resource:
        self.resources[kind].append({IDS[kind]: str(uuid.uuid4()), **resource})
        return self.resources[kind][-1]

    def _find(self, kind: str, identity: str) -> Resource:
        for resource in self.resources[kind]:
            if resource[IDS[kind]] == identity:
                return resource
        raise ProblemError(NOT_FOUND, f"ResourceNotFoundError: {kind} {identity} not found.")


class Handler(BaseHTTPRequestHandler):
    """Translates between HTTP and the state."""

    state: KubeflowPipelines

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""

    def _do(self) -> None:
        self.state.authorizations.add(self.headers.get("authorization", ""))
        if self.state.page:
            self._send(200, "text/html; charset=utf-8", self.state.page)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {"file": self._uploaded_file(data)} if "upload" in url.path else json.loads(data or b"{}")
        try:
            status, answer = 200, self.state.answer(self.command, url.path, query, body)
        except ProblemError as error:
            status = error.status
            answer = {"error": str(error), "code": error.code, "message": str(error)}
            # Uploads are not served by the gateway.
            if "upload" in url.path:
                answer = {"error_message": str(error), "error_details": f"Error: {error}"}
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def _uploaded_file(self, data: bytes) -> str:
        boundary = re.search(r"boundary=(\S+)", self.headers["Content-Type"])
        assert boundary
        part = data.split(b"--" + boundary[1].encode())[1]
        head, _, content = part.partition(b"\r\n\r\n")
        assert b'name="uploadfile"' in head
        return content.removesuffix(b"\r\n").decode()

    do_GET = do_POST = do_DELETE = _do  # noqa: N815 - the standard library's names


@contextmanager
def serve_pipelines() -> Iterator[tuple[str, KubeflowPipelines]]:
    """Serve until the block ends, and yield the address and the state."""
    state = KubeflowPipelines()
    handler = type("Bound", (Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", state
        finally:
            server.shutdown()
            thread.join()
