"""The object stores that the tests talk to: real servers, each in a process of its own.

`python servers.py gs` (or `s3`) serves on a free loopback port, prints its address once it listens, and ends when
its standard input closes, so that no server outlives the tests, however they end.
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
    """Run the server of a scheme, gs or s3, and yield its address."""
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
    """Return the emulator of Google Cloud Storage, in memory, with two rules of the real service that it leaves out.

    Without them the tests could not tell whether our requests carry the precondition, and whether the answer is read
    right: `ifGenerationMatch` fails for another generation, 0 for an object that exists (412), and so does a range past
    the end (416).
    https://cloud.google.com/storage/docs/request-preconditions, https://cloud.google.com/storage/docs/json_api/v1/status-codes
    The emulator answers one request at a time, so a precondition is checked and acted upon at once.
    """
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import HANDLERS, RequestHandler
    from gcp_storage_emulator.storage import Storage

    replaced = {
        objects.insert: partial(_insert, objects.insert),
        objects.download: partial(_download, objects.download),
    }
    for _, methods in HANDLERS:
        for method, handler in methods.items():
            methods[method] = replaced.get(handler, handler)
    return HTTPServer(("127.0.0.1", 0), partial(RequestHandler, Storage(use_memory_fs=True)))


GENERATIONS = count(1)  # the emulator's own are the seconds of the clock: two writes could share one


def _insert(insert: Callable[..., None], request: Any, response: Any, storage: Any) -> None:
    sent = request.data or {}  # the object's name is in the query, or in the metadata that are sent along
    name = request.query.get("name") or [(sent.get("meta") or sent)["name"]]
    existing = storage.objects.get(request.params["bucket_name"], {})
    asked = request.query.get("ifGenerationMatch")
    there = str(existing[name[0]]["generation"]) if name[0] in existing else "0"
    if asked and asked != [there]:
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        insert(request, response, storage)
        stored = storage.objects.get(request.params["bucket_name"], {}).get(name[0])
        if stored:
            stored["generation"] = str(next(GENERATIONS))


def _download(download: Callable[..., None], request: Any, response: Any, storage: Any) -> None:
    stored = storage.objects.get(request.params["bucket_name"], {}).get(request.params["object_id"])
    asked = request.query.get("ifGenerationMatch")
    if stored and asked and asked != [str(stored["generation"])]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    download(request, response, storage)
    if response.status == HTTPStatus.PARTIAL_CONTENT and not response._content:
        response.status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def s3_server() -> HTTPServer:
    """Return moto's S3, with ten keys on a page of a listing instead of a thousand.

    One request at a time: S3's conditional write is atomic, moto's threads are not.
    """
    os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = "10"
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    moto = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def application(environ: Any, start_response: Any) -> Any:
        with one_at_a_time:
            return moto(environ, start_response)

    return make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)


def main(scheme: str) -> None:
    """Serve until standard input closes."""
    server = {"gs": gcs_server, "s3": s3_server}[scheme]()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
