"""Run the Go tests of this folder, which check statements about Argo Workflows with its own functions.

`go.mod` names the version of Argo Workflows that Kubeflow Pipelines 2.17.0 installs.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
# The first run downloads and compiles Argo's packages. Later runs use Go's caches.
BUILD_S = 1200


def test_statements_about_argo_hold() -> None:
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if not go:
        pytest.skip("no Go toolchain")
    environment = {**os.environ, "GOFLAGS": "-mod=readonly", "GOMAXPROCS": "2"}
    command = [go, "test", "-v", "./..."]
    completed = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "--- PASS: TestThePatchRetriesWhatHelps" in completed.stdout
