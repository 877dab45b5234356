"""The Kubeflow Pipelines API, through kfp's own client, its errors in one line.

Host, namespace and credentials are kfp's to find: KF_PIPELINES_ENDPOINT, KF_PIPELINES_UI_ENDPOINT, KF_PIPELINES_IAP_*,
KF_PIPELINES_SA_TOKEN_PATH, ~/.config/kfp/context.json, the current kubectl context, or the cluster it runs in.
"""

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

HOST, TOKEN = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"
PAGE = 100
NON_RETRYABLE_STATUS = (400, 409, 412, 422)  # what asking again does not change
SERVICE_ACCOUNT = "semiscale"  # of manifests/base: RBAC and the buckets' rights are bound to it


@dataclass(frozen=True)
class Server:
    """Which Kubeflow Pipelines to talk to, and what pods run as there. Empty: as kfp's own configuration says."""

    host: str = ""
    namespace: str = ""
    service_account: str = SERVICE_ACCOUNT


class _Client(Client):  # type: ignore[misc]  # kfp is untyped
    """kfp's client, which asks once whether a server is there: kfp's own asks five times, and logs five tracebacks."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Return the server's health. Raises InvalidInputError where it is no Kubeflow Pipelines that answers.

        A login page comes with status 200, and kfp takes it for an answer in which everything is empty.
        """
        health, _, headers = self._healthz_api.healthz_service_get_healthz_with_http_info()
        kind = headers.get("Content-Type", "nothing")
        if "json" not in kind:
            raise InvalidInputError(
                f"what answers is not Kubeflow Pipelines, or asks for a login first: {kind} instead of JSON; check "
                "the credentials, and --host, which in Kubeflow ends in /pipeline"
            )
        return health


def connect(server: Server) -> Client:
    """Return kfp's client. Raises InvalidInputError where nothing says which server to talk to."""
    kubeconfig = os.environ.get("KUBECONFIG", str(Path("~/.kube/config").expanduser()))
    told = server.host or os.environ.get(HOST) or os.environ.get("KUBERNETES_SERVICE_HOST")
    if not told and not any(Path(path).is_file() for path in kubeconfig.split(os.pathsep)):
        raise InvalidInputError(
            f"no Kubeflow Pipelines to talk to: give --host, or set {HOST}, or choose a kubectl context"
        )
    token = os.environ.get(TOKEN)
    if token and not Path(token).is_file():
        raise InvalidInputError(f"{TOKEN}: {token}: no such file")
    credentials = ServiceAccountTokenVolumeCredentials() if token else None
    options = {"namespace": server.namespace} if server.namespace else {}
    with translate_api_errors(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)  # that the server is of version 2, as ours is
        warnings.filterwarnings("ignore", message="The host .* does not contain")
        found = _Client(host=server.host or None, credentials=credentials, **options)
        found.get_kfp_healthz()
        return found


@contextlib.contextmanager
def translate_api_errors() -> Iterator[None]:
    """Raise the project's errors for the client's, in one line that says what the server answered."""
    try:
        yield
    except kfp_server_api.ApiException as error:
        said = _message(error)
        if error.status in (401, 403):
            raise InvalidInputError(
                f"Kubeflow Pipelines: not allowed ({error.status}): {said}; check the credentials"
            ) from None
        if error.status == 404:
            raise InvalidInputError(f"Kubeflow Pipelines: no such thing: {said}") from None
        if error.status in NON_RETRYABLE_STATUS:
            raise InvalidInputError(f"Kubeflow Pipelines refuses it ({error.status}): {said}") from None
        raise SemiscaleError(f"Kubeflow Pipelines answered {error.status}: {said}") from None
    except (urllib3.exceptions.HTTPError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise SemiscaleError(f"Kubeflow Pipelines does not answer: {_plain(reason)}; check --host") from None


def call_with_url(act: Callable[[], Any]) -> tuple[Any, str]:
    """Call the client; returns its answer, and the address in the UI that it prints."""
    said = io.StringIO()
    with translate_api_errors(), contextlib.redirect_stdout(said):
        answer = act()
    found = re.search(r"details: (\S+)", said.getvalue())
    return answer, redact_credentials(found[1]) if found else ""


def display_name_filter(name: str) -> str:
    """Return the filter of the API that finds things by their name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def list_all(listing: Callable[..., Any], field: str, **options: Any) -> list[Any]:
    """Return the whole of a list that the server gives in pages."""
    found: list[Any] = []
    token = ""
    while True:
        with translate_api_errors():
            page = listing(page_token=token, page_size=PAGE, **options)
        found.extend(getattr(page, field) or [])
        token = page.next_page_token or ""
        if not token:
            return found


def _message(error: kfp_server_api.ApiException) -> str:
    try:
        content = json.loads(error.body)
        said = content.get("message") or content.get("error") or error.reason
    except (TypeError, ValueError, AttributeError):
        said = error.reason or error.body
    return _plain(said)


def _plain(said: object) -> str:
    return " ".join(re.sub(r"<[^>]*> ?", "", str(said)).split())[:300]
