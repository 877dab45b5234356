"""Run a Kubernetes API server over etcd, without controllers and nodes.

No pod ever runs. `tests/apiserver/build.sh` builds the API server, etcd and kubectl. Schemas, admission (pod security,
limits, service accounts) and authorization work as in a cluster.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.servers import find_free_port

PROGRAMS = ("kube-apiserver", "kubectl", "etcd")
START_S = 120
ADMIN = "the-tests-own"  # a token


def find_program(name: str) -> str | None:
    """Return where a program is, if it is anywhere."""
    return shutil.which(name) or shutil.which(name, path=str(Path.home() / "go" / "bin"))


class ApiServer:
    """The server, as its administrator sees it; `kubectl` speaks for whoever a kubeconfig says."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address
        self.kubeconfig = self.kubeconfig_of(ADMIN, "default")

    def kubeconfig_of(self, token: str, namespace: str) -> Path:
        """Write how the bearer of a token gets here."""
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
        """Run kubectl; an object on its standard input is for `-f -`."""
        kubectl = find_program("kubectl")
        assert kubectl
        command = [kubectl, "--kubeconfig", str(self.kubeconfig), *arguments]
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=START_S)

    def done(self, *arguments: str, stdin: Any = None) -> str:
        """Run kubectl, which is to succeed and to warn of nothing; returns what it prints."""
        ended = self.kubectl(*arguments, stdin=stdin)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        return ended.stdout


@contextmanager
def serve_api(folder: Path) -> Iterator[ApiServer]:
    """Serve an empty cluster's API."""
    etcd, peer, port = (find_free_port() for _ in range(3))
    key = folder / "key.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f"{ADMIN},admin,admin,system:masters\n")
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
        _wait_for(server)
        yield server


def _wait_for(server: ApiServer) -> None:
    until = time.monotonic() + START_S
    while (answer := server.kubectl("get", "--raw", "/readyz")).stdout != "ok":
        assert time.monotonic() < until, answer.stderr
        time.sleep(0.5)
