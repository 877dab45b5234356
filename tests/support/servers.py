"""Run object stores as servers, each in its own process.

`python servers.py gs` (or `s3`) serves on a free loopback port and prints its address as soon as it listens. It ends
when its standard input closes, so that no server outlives the tests.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from itertools import count
from typing import Any


@contextmanager
def serve_store(scheme: str) -> Iterator[str]:
    """Run the server of a scheme (gs or s3), and yield its address."""
    command = [sys.executable, __file__, scheme]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), f"the {scheme} server did not start"
            yield address
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def find_free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def gcs_server() -> HTTPServer:
    """Return the emulator of Google Cloud Storage, in memory, with two more rules.

    The real service has both rules, and the emulator lacks them. `ifGenerationMatch` fails for another generation, and
    0 fails for an object that exists (412). A range past the end fails (416). The rules test whether our requests carry
    the precondition and whether we read the answer correctly.
    https://cloud.google.com/storage/docs/request-preconditions, https://cloud.google.com/storage/docs/json_api/v1/status-codes
    The emulator answers one request at a time, so the check of a precondition and the write are atomic.
    """
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import HANDLERS, RequestHandler
    from gcp_storage_emulator.storage import Storage

    wrappers = {
        objects.insert: partial(_insert, objects.insert),
        objects.download: partial(_download, objects.download),
    }
    for _, methods in HANDLERS:
        for method, handler in methods.items():
            methods[method] = wrappers.get(handler, handler)
    return HTTPServer(("127.0.0.1", 0), partial(RequestHandler, Storage(use_memory_fs=True)))


# The emulator takes the seconds of the clock as generations, so two writes could have the same one.
GENERATIONS = count(1)


def _insert(insert: Callable[..., None], request: Any, response: Any, storage: Any) -> None:
    # The name of the object is in the query or in the metadata of the request.
    data = request.data or {}
    name = request.query.get("name") or [(data.get("meta") or data)["name"]]
    existing = storage.objects.get(request.params["bucket_name"], {})
    expected = request.query.get("ifGenerationMatch")
    current = str(existing[name[0]]["generation"]) if name[0] in existing else "0"
    if expected and expected != [current]:
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        insert(request, response, storage)
        stored = storage.objects.get(request.params["bucket_name"], {}).get(name[0])
        if stored:
            stored["generation"] = str(next(GENERATIONS))


def _download(download: Callable[..., None], request: Any, response: Any, storage: Any) -> None:
    stored = storage.objects.get(request.params["bucket_name"], {}).get(request.params["object_id"])
    expected = request.query.get("ifGenerationMatch")
    if stored and expected and expected != [str(stored["generation"])]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    download(request, response, storage)
    if response.status == HTTPStatus.PARTIAL_CONTENT and not response._content:
        response.status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def s3_server() -> HTTPServer:
    """Return moto's S3, with ten keys on a page of a listing instead of a thousand.

    It serves one request at a time. The conditional write of S3 is atomic, but moto's threads are not.
    """
    os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = "10"
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    # werkzeug logs a line for every request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    request_lock = threading.Lock()

    def application(environ: Any, start_response: Any) -> Any:
        with request_lock:
            return moto(environ, start_response)

    return make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)


def main(scheme: str) -> None:
    """Serve a scheme until standard input closes."""
    server = {"gs": gcs_server, "s3": s3_server}[scheme]()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
