"""Run a Kubernetes API server over etcd, without nodes, and controllers where a test wants them.

No pod runs by itself. `tests/apiserver/build.sh` builds the programs. Schemas, admission (pod security, limits, service
accounts) and authorization work as in a cluster.
"""

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml

from tests.support.servers import find_free_port

PROGRAMS = ("kube-apiserver", "kubectl", "etcd")
CONTROLLERS = "kube-controller-manager"
START_S = 120
# The bearer token of the administrator.
ADMIN_TOKEN = "the-tests-own"


def find_program(name: str) -> str | None:
    """Return the path of a program, or None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=str(Path.home() / "go" / "bin"))


class ApiServer:
    """The API server, with the rights of its administrator."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address
        # The certificate of the server signs itself.
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self.kubeconfig = self.write_kubeconfig(ADMIN_TOKEN, "default")

    def write_kubeconfig(self, token: str, namespace: str) -> Path:
        """Write a kubeconfig for the bearer of a token, and return its path."""
        cluster = {"server": self._address, "insecure-skip-tls-verify": True}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
        }
        path = self._folder / f"kubeconfig-{len(list(self._folder.glob('kubeconfig-*')))}"
        path.write_text(yaml.safe_dump(content))
        return path

    def kubectl(self, *arguments: str, stdin: Any = None) -> "subprocess.CompletedProcess[str]":
        """Run kubectl with an object on its standard input, for `-f -`."""
        kubectl = find_program("kubectl")
        assert kubectl
        command = [kubectl, "--kubeconfig", str(self.kubeconfig), *arguments]
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=START_S)

    def check_kubectl(self, *arguments: str, stdin: Any = None) -> str:
        """Run kubectl, check that it succeeds without a warning, and return its output."""
        completed = self.kubectl(*arguments, stdin=stdin)
        assert (completed.returncode, completed.stderr) == (0, ""), completed.stderr
        return completed.stdout

    def request(self, method: str, path: str, content: Any = None, content_type: str = "application/json") -> Any:
        """Send a request to the API, and return its answer.

        Args:
            method: Method of HTTP.
            path: Path and query.
            content: Object to send.
            content_type: Type of a patch.

        Raises:
            HTTPError: The API server refused the request.
        """
        data = None if content is None else json.dumps(content).encode()
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": content_type}
        request = Request(f"{self._address}{path}", data, headers, method=method)
        with urlopen(request, context=self._tls, timeout=START_S) as answer:
            return json.load(answer)


@contextmanager
def run_controllers(server: ApiServer, folder: Path, *names: str) -> Iterator[None]:
    """Run controllers of Kubernetes as the administrator."""
    options = [
        "--kubeconfig", str(server.kubeconfig), "--controllers", ",".join(names), "--leader-elect=false",
        "--use-service-account-credentials=false", "--secure-port", "0", "--bind-address", "127.0.0.1",
    ]  # fmt: skip
    with (folder / f"{CONTROLLERS}.log").open("wb") as log:
        process = subprocess.Popen([find_program(CONTROLLERS) or CONTROLLERS, *options], stdout=log, stderr=log)
        try:
            yield
            assert process.poll() is None, (folder / f"{CONTROLLERS}.log").read_text()[-2000:]
        finally:
            process.kill()
            process.wait()


@contextmanager
def serve_api(folder: Path) -> Iterator[ApiServer]:
    """Serve the API of an empty cluster."""
    etcd, peer, port = (find_free_port() for _ in range(3))
    key = folder / "key.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n")
    store = f"http://127.0.0.1:{etcd}"
    commands = [
        [
            "etcd", "--data-dir", str(folder / "etcd"), "--listen-client-urls", store, "--advertise-client-urls", store,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--unsafe-no-fsync", "--log-level", "error",
        ],
        [
            "kube-apiserver", "--etcd-servers", store, "--bind-address", "127.0.0.1", "--secure-port", str(port),
            "--cert-dir", str(folder / "certificates"), "--authorization-mode", "RBAC",
            "--token-auth-file", str(folder / "tokens.csv"), "--service-account-issuer", "https://test",
            "--service-account-key-file", str(key), "--service-account-signing-key-file", str(key),
            "--service-cluster-ip-range", "10.0.0.0/24",
        ],
    ]  # fmt: skip
    with ExitStack() as stack:
        for name, *options in commands:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen([find_program(name) or name, *options], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        server = ApiServer(folder, f"https://127.0.0.1:{port}")
        _wait_until_ready(server)
        yield server


def _wait_until_ready(server: ApiServer) -> None:
    until = time.monotonic() + START_S
    while (answer := server.kubectl("get", "--raw", "/readyz")).stdout != "ok":
        assert time.monotonic() < until, answer.stderr
        time.sleep(0.5)
