"""A stand-in for Kubeflow Pipelines: the part of its REST API (v2beta1) that the verbs use, with its rules, over HTTP.

https://www.kubeflow.org/docs/components/pipelines/reference/api/kubeflow-pipeline-api-spec/: filters on the display
name, pages of at most `page_size`, names that are unique, a concurrency of 1 to 10, cron expressions of six fields.
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

Thing = dict[str, Any]
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
EQUALS = 1  # of the enumeration, which may be written by number or by name


class ProblemError(Exception):
    """An answer that is an error: the HTTP status, and the code of gRPC."""

    def __init__(self, status: tuple[int, int], message: str) -> None:
        super().__init__(message)
        self.status, self.code = status


class KubeflowPipelines:
    """The server's state."""

    def __init__(self) -> None:
        self.things: dict[str, list[Thing]] = {kind: [] for kind in IDS}
        self.authorizations: set[str] = set()
        self.forbidden = False
        self.page = b""  # what is answered in its place: a login's, by a proxy before it
        self.page_size = 2  # as few as are asked for, and no more than these

    def named(self, kind: str) -> list[str]:
        """Return the names of all things of a kind."""
        return [thing["display_name"] for thing in self.things[kind]]

    def answer(self, method: str, path: str, query: dict[str, str], body: Thing) -> Thing:
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

    def _upload(self, what: str, query: dict[str, str], body: Thing) -> Thing:
        kind = "pipelines" if what == "upload" else "versions"
        parent = {"pipeline_id": query["pipelineid"]} if kind == "versions" else {}
        taken = [one for one in self.things[kind] if parent.items() <= one.items()]
        if query["name"] in [one["display_name"] for one in taken]:
            raise ProblemError(EXISTS, f"Failed to create a new {kind}: the name {query['name']} already exist")
        return self._add(kind, {"display_name": query["name"], **parent, "pipeline_spec": body["file"]})

    def _create(self, kind: str, body: Thing) -> Thing:
        if kind in ("runs", "recurringruns"):
            version = body["pipeline_version_reference"]["pipeline_version_id"]
            self._find("versions", version)
            self._find("experiments", body["experiment_id"])
        if kind == "recurringruns":
            if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
                raise ProblemError(INVALID, "The max concurrency of the recurring run must be between 1 and 10")
            if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                raise ProblemError(INVALID, "Expected exactly 6 fields in the cron expression")
            body["max_concurrency"] = str(body["max_concurrency"])  # an int64, which JSON carries as text
        # What the server fills in where a caller names none, in an installation for one user.
        if kind in ("runs", "recurringruns"):
            body["service_account"] = body.get("service_account") or "pipeline-runner"
        return self._add(kind, {**body, **({"state": "RUNNING"} if kind == "runs" else {})})

    def _act(self, method: str, kind: str, identity: str, verb: str) -> Thing:
        thing = self._find(kind, identity)
        if method == "DELETE":
            self.things[kind].remove(thing)
        elif verb == "terminate":
            thing["state"] = "CANCELING"
        return thing if method == "GET" else {}

    def _page(self, kind: str, parts: list[str], query: dict[str, str]) -> Thing:
        found = self.things[kind]
        if len(parts) == 3:
            found = [thing for thing in found if thing["pipeline_id"] == parts[1]]
        if "experiment_id" in query:
            found = [thing for thing in found if thing["experiment_id"] == query["experiment_id"]]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            assert predicate["operation"] in (EQUALS, "EQUALS")
            assert predicate["key"] == "display_name"
            found = [thing for thing in found if thing["display_name"] == predicate["stringValue"]]
        start = int(query.get("page_token") or 0)
        size = min(int(query.get("page_size") or 20), self.page_size)
        more = {"next_page_token": str(start + size)} if start + size < len(found) else {}
        # What is empty is left out of the answer, as the server's gateway does.
        return {**({FIELDS.get(kind, kind): found[start : start + size]} if found else {}), **more}

    def _add(self, kind: str, thing: Thing) -> Thing:
        self.things[kind].append({IDS[kind]: str(uuid.uuid4()), **thing})
        return self.things[kind][-1]

    def _find(self, kind: str, identity: str) -> Thing:
        for thing in self.things[kind]:
            if thing[IDS[kind]] == identity:
                return thing
        raise ProblemError(NOT_FOUND, f"ResourceNotFoundError: {kind} {identity} not found.")


class Handler(BaseHTTPRequestHandler):
    """Takes HTTP apart and puts it together."""

    state: KubeflowPipelines

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def _do(self) -> None:
        self.state.authorizations.add(self.headers.get("authorization", ""))
        if self.state.page:
            self._send(200, "text/html; charset=utf-8", self.state.page)
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {"file": self._uploaded(data)} if "upload" in url.path else json.loads(data or b"{}")
        try:
            status, answer = 200, self.state.answer(self.command, url.path, query, body)
        except ProblemError as problem:
            status, answer = problem.status, {"error": str(problem), "code": problem.code, "message": str(problem)}
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def _uploaded(self, data: bytes) -> str:
        boundary = re.search(r"boundary=(\S+)", self.headers["Content-Type"])
        assert boundary
        part = data.split(b"--" + boundary[1].encode())[1]
        head, _, content = part.partition(b"\r\n\r\n")
        assert b'name="uploadfile"' in head
        return content.removesuffix(b"\r\n").decode()

    do_GET = do_POST = do_DELETE = _do  # noqa: N815 - the standard library's names


@contextmanager
def serve_pipelines() -> Iterator[tuple[str, KubeflowPipelines]]:
    """Serve for the length of a `with`; yields the address and the state."""
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
