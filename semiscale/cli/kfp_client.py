"""The client of the Kubeflow Pipelines API, with errors of one line.

kfp finds host, namespace and credentials: KF_PIPELINES_ENDPOINT, KF_PIPELINES_UI_ENDPOINT, KF_PIPELINES_IAP_*,
KF_PIPELINES_SA_TOKEN_PATH, ~/.config/kfp/context.json, the current kubectl context, or the cluster it runs in.
"""

import argparse
import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3
from kfp import Client
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import redact_credentials

HOST_ENV, TOKEN_PATH_ENV = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"
PAGE_SIZE = 100
MAX_MESSAGE_CHARACTERS = 300
# States of a run that can be cancelled. A run in state CANCELING ends by itself.
ACTIVE_STATES = ("PENDING", "RUNNING", "PAUSED")
# The server answers the same request with the same status again.
NON_RETRYABLE_STATUS = (400, 409, 412, 422)
# manifests/base binds RBAC and the rights for the buckets to this account.
SERVICE_ACCOUNT = "semiscale"


@dataclass(frozen=True)
class Server:
    """The Kubeflow Pipelines to call, and the service account of pods there.

    Attributes:
        host: Address of the API. Empty: as kfp is configured.
        namespace: Namespace of the user. Empty: as kfp is configured.
        service_account: Service account of the pods.
    """

    host: str = ""
    namespace: str = ""
    service_account: str = SERVICE_ACCOUNT


class _Client(Client):  # type: ignore[misc]  # kfp is untyped
    """kfp's client with a health check of one request.

    The check of kfp sends five requests and logs five tracebacks.
    """

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Return the health of the server.

        A login page has status 200, and kfp parses it as an answer whose fields are all empty.

        Args:
            sleep_duration: Not used; part of the signature of kfp.

        Raises:
            InvalidInputError: The answer is not that of Kubeflow Pipelines.
        """
        health, _, headers = self._healthz_api.healthz_service_get_healthz_with_http_info()
        content_type = headers.get("Content-Type", "nothing")
        if "json" not in content_type:
            raise InvalidInputError(
                "SEMI-E414",
                f"--host: The server is not Kubeflow Pipelines, or requires a login: it sent {content_type} instead of "
                "JSON. Check the credentials and the address, which ends in /pipeline in Kubeflow.",
            )
        return health


def connect(server: Server) -> Client:
    """Return a client whose server has answered.

    Args:
        server: Kubeflow Pipelines to call.

    Raises:
        InvalidInputError: No server is configured, the token is missing, or the server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    kubeconfig = os.environ.get("KUBECONFIG", str(Path("~/.kube/config").expanduser()))
    host = server.host or os.environ.get(HOST_ENV) or os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host and not any(Path(path).is_file() for path in kubeconfig.split(os.pathsep)):
        raise InvalidInputError(
            "SEMI-E412",
            f"--host: No Kubeflow Pipelines server is configured. Give --host, set {HOST_ENV}, or choose a kubectl "
            "context.",
        )
    token = os.environ.get(TOKEN_PATH_ENV)
    if token and not Path(token).is_file():
        raise InvalidInputError(
            "SEMI-E413", f"{TOKEN_PATH_ENV}: {token} does not exist. Set it to the path of a token, or unset it."
        )
    credentials = ServiceAccountTokenVolumeCredentials() if token else None
    options = {"namespace": server.namespace} if server.namespace else {}
    with translate_api_errors(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # kfp warns that it expects a server of version 2, which is the version that this program supports.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The host .* does not contain")
        client = _Client(host=server.host or None, credentials=credentials, **options)
        client.get_kfp_healthz()
        return client


@contextlib.contextmanager
def translate_api_errors() -> Iterator[None]:
    """Translate errors of the client into errors of one line with the server's message.

    Raises:
        InvalidInputError: The server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    try:
        yield
    except kfp_server_api.ApiException as error:
        message = _server_message(error)
        if error.status in (401, 403):
            raise InvalidInputError(
                "SEMI-E415",
                f"Kubeflow Pipelines: The request is not allowed ({error.status}): {message}. Check the credentials.",
            ) from None
        if error.status == 404:
            raise InvalidInputError(
                "SEMI-E416", f"Kubeflow Pipelines: The object does not exist: {message}. Check the id and --namespace."
            ) from None
        if error.status in NON_RETRYABLE_STATUS:
            raise InvalidInputError(
                "SEMI-E417",
                f"Kubeflow Pipelines: The server rejects the request ({error.status}): {message}. Correct the request.",
            ) from None
        raise SemiscaleError(
            "SEMI-E418",
            f"Kubeflow Pipelines: The server failed ({error.status}): {message}. Try again later, or see its log.",
        ) from None
    except (urllib3.exceptions.HTTPError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise SemiscaleError(
            "SEMI-E419", f"Kubeflow Pipelines: The server does not answer: {_strip_markup(reason)}. Check --host."
        ) from None


def find_experiments(client: Client, name: str, namespace: str) -> list[Any]:
    """Return the experiments that have the name of a run.

    Args:
        client: Client of the server.
        name: Name of the run.
        namespace: Namespace of the user. Empty: the server has none.
    """
    owner = {"namespace": namespace} if namespace else {}
    return list_all(client.list_experiments, "experiments", filter=display_name_filter(name), **owner)


def find_runs(client: Client, name: str, namespace: str) -> Iterator[Any]:
    """Yield the runs of a run file on the server, the newest first.

    Args:
        client: Client of the server.
        name: Name of the run, which its experiment has too.
        namespace: Namespace of the user. Empty: the server has none.
    """
    for experiment in find_experiments(client, name, namespace):
        yield from iter_pages(
            client.list_runs, "runs", experiment_id=experiment.experiment_id, sort_by="created_at desc"
        )


def call_with_url(request: Callable[[], Any]) -> tuple[Any, str]:
    """Call the client and capture the address that it prints.

    Args:
        request: Function that calls the client.

    Returns:
        The answer, and the address of the object in the UI. Empty: the client printed none.
    """
    output = io.StringIO()
    with translate_api_errors(), contextlib.redirect_stdout(output):
        answer = request()
    url = re.search(r"details: (\S+)", output.getvalue())
    return answer, redact_credentials(url[1]) if url else ""


def display_name_filter(name: str) -> str:
    """Return the API filter that finds objects by their name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def list_all(list_page: Callable[..., Any], field: str, **options: Any) -> list[Any]:
    """Return all items of a list. See `iter_pages` for the arguments."""
    return list(iter_pages(list_page, field, **options))


def iter_pages(list_page: Callable[..., Any], field: str, **options: Any) -> Iterator[Any]:
    """Yield the items of a list. A page is requested when its first item is needed.

    Args:
        list_page: Method of the client that lists one page.
        field: Name of the field of a page that has the items.
        **options: Further arguments of the method.
    """
    token = ""
    while True:
        with translate_api_errors():
            page = list_page(page_token=token, page_size=PAGE_SIZE, **options)
        yield from getattr(page, field) or []
        token = page.next_page_token or ""
        if not token:
            return


def _server_message(error: kfp_server_api.ApiException) -> str:
    try:
        content = json.loads(error.body)
        # An upload answers with `error_message`, every other request with `message`.
        message = content.get("message") or content.get("error_message") or content.get("error") or error.reason
    except (TypeError, ValueError, AttributeError):
        message = error.reason or error.body
    return _strip_markup(message)


def _strip_markup(message: object) -> str:
    """Return a message as one line without HTML tags, cut to its first characters."""
    return " ".join(re.sub(r"<[^>]*> ?", "", str(message)).split())[:MAX_MESSAGE_CHARACTERS].rstrip(".")


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that calls Kubeflow Pipelines."""
    parser.add_argument("--host", default="", help="of Kubeflow Pipelines; default: as kfp is configured")
    parser.add_argument("--namespace", default="", help="of the user, where Kubeflow has several")


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that starts runs."""
    parser.add_argument(
        "--service-account", default=SERVICE_ACCOUNT, metavar="NAME", help="that the pods run as (%(default)s)"
    )
    parser.add_argument(
        "--images-on-nodes", action="store_true", help="the nodes have the images; no registry is needed"
    )


def server_from_options(options: argparse.Namespace) -> Server:
    """Return the server that the arguments of a verb name."""
    return Server(options.host, options.namespace, getattr(options, "service_account", SERVICE_ACCOUNT))
