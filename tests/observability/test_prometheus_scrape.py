"""Test that Prometheus finds the pods by the PodMonitor and fills every panel."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from semiscale.config.resources import METRICS_PORT
from semiscale.observability.progress import Progress
from semiscale.observability.prometheus import PORT_ENV, serve_metrics
from tests.observability.test_metrics_endpoint import DASHBOARD, LIMIT_S
from tests.support.api_server import find_program
from tests.support.servers import find_free_port

pytestmark = pytest.mark.slow

MONITOR = DASHBOARD.parents[1] / "components" / "prometheus-operator" / "pod-monitor.yaml"
POD = "__meta_kubernetes_pod_"
NODE = f"{POD}annotation_batch_kubernetes_io_job_completion_index"
# Kubernetes gives Prometheus a target for each container of the pods. The targets have no port, because no port is
# declared.
CONTAINERS = [
    *({f"{POD}ip": "127.0.0.1", f"{POD}container_name": name, "pod": "score"} for name in ("init", "wait", "main")),
    *({f"{POD}ip": f"127.0.0.{2 + node}", f"{POD}container_name": "node", NODE: str(node), "pod": f"train-{node}"}
      for node in range(2)),
]  # fmt: skip


def write_config(folder: Path, port: int) -> Path:
    """Write the configuration that the operator makes of the PodMonitor.

    Args:
        folder: The folder of the file.
        port: The port of the metrics.
    """
    (endpoint,) = yaml.safe_load(MONITOR.read_text())["spec"]["podMetricsEndpoints"]
    prometheus_names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    rules = [
        {prometheus_names.get(name, name): value for name, value in rule.items()} for rule in endpoint["relabelings"]
    ]
    rules[-1]["replacement"] = rules[-1]["replacement"].replace(METRICS_PORT, str(port))
    targets = [
        {"targets": [labels[f"{POD}ip"]], "labels": {**labels, "namespace": "semiscale"}} for labels in CONTAINERS
    ]
    (folder / "pods.json").write_text(json.dumps(targets))
    job = {"job_name": "pods", "file_sd_configs": [{"files": [str(folder / "pods.json")]}], "relabel_configs": rules}
    path = folder / "prometheus.yml"
    path.write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]})
    )
    return path


def query_prometheus(address: str, path: str) -> Any:
    """Return an answer of Prometheus, or nothing if it does not listen yet."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/{path}", timeout=LIMIT_S) as answer:
            return json.load(answer)["data"]
    except urllib.error.URLError:
        return {}


def panel_queries() -> dict[str, str]:
    """Return the query of each panel by its title, for all namespaces and stages."""
    queries = [
        (panel["title"], target["expr"])
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    return {
        title: expr.replace("$namespace", ".*").replace("$stage", ".*").replace("[5m]", "[30s]")
        for title, expr in queries
    }


def test_prometheus_scrapes_a_pod_once_and_fills_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = find_program("prometheus")
    if not binary:
        pytest.skip("no prometheus on the PATH or in ~/go/bin; .ci/run says how")
    port, own_port = find_free_port(), find_free_port()
    address = f"http://127.0.0.1:{own_port}"
    monkeypatch.setenv(PORT_ENV, str(port))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    command = [binary, f"--config.file={write_config(tmp_path, port)}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    progress = Progress("score", 10_000)
    with (
        serve_metrics("score", "score-0"),
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{own_port}", "--log.level=error"]) as process,
    ):
        try:
            # On a busy machine a scrape can time out. The next scrape replaces it.
            empty, until = (
                {**panel_queries(), "pods": "count(max_over_time(up[1h]) == 1) == 2"},
                time.monotonic() + LIMIT_S,
            )
            while empty and time.monotonic() < until:
                progress.update(3)
                progress.add_seconds(read=0.2, decode=0.3)
                answers = {
                    title: query_prometheus(address, f"query?query={urllib.parse.quote(expr)}")
                    for title, expr in empty.items()
                }
                empty = {title: expr for title, expr in empty.items() if not answers[title].get("result")}
                time.sleep(0.5)
            targets = query_prometheus(address, "targets")["activeTargets"]
        finally:
            process.terminate()
    assert empty == {}
    assert sorted((target["labels"]["pod"], target["scrapeUrl"]) for target in targets) == [
        ("score", f"http://127.0.0.1:{port}/metrics"),
        ("train-0", f"http://127.0.0.2:{port}/metrics"),
    ], "one target a pod; of a training's nodes the first"
