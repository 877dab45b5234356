"""Prometheus itself finds the pods by the PodMonitor's rules, scrapes them, and fills every panel of the dashboard."""

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
# What Kubernetes tells Prometheus of two pods: one target for each container, without a port, as none is declared.
CONTAINERS = [
    *({f"{POD}ip": "127.0.0.1", f"{POD}container_name": name, "pod": "score"} for name in ("init", "wait", "main")),
    *({f"{POD}ip": f"127.0.0.{2 + node}", f"{POD}container_name": "node", NODE: str(node), "pod": f"train-{node}"}
      for node in range(2)),
]  # fmt: skip


def configured(folder: Path, port: int) -> Path:
    """Write Prometheus' configuration: what the operator makes of the PodMonitor, for the metrics at another port."""
    (endpoint,) = yaml.safe_load(MONITOR.read_text())["spec"]["podMetricsEndpoints"]
    spelled = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    rules = [{spelled.get(name, name): value for name, value in rule.items()} for rule in endpoint["relabelings"]]
    rules[-1]["replacement"] = rules[-1]["replacement"].replace(METRICS_PORT, str(port))
    told = [{"targets": [one[f"{POD}ip"]], "labels": {**one, "namespace": "semiscale"}} for one in CONTAINERS]
    (folder / "pods.json").write_text(json.dumps(told))
    job = {"job_name": "pods", "file_sd_configs": [{"files": [str(folder / "pods.json")]}], "relabel_configs": rules}
    path = folder / "prometheus.yml"
    path.write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]})
    )
    return path


def asked(address: str, path: str) -> Any:
    """Ask Prometheus; nothing while it does not answer yet."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/{path}", timeout=LIMIT_S) as answer:
            return json.load(answer)["data"]
    except urllib.error.URLError:
        return {}


def panels() -> dict[str, str]:
    """Return what the dashboard asks, by the title of the panel, as Grafana does for all namespaces and stages."""
    drawn = [
        (panel["title"], target["expr"])
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    return {
        title: expr.replace("$namespace", ".*").replace("$stage", ".*").replace("[5m]", "[30s]")
        for title, expr in drawn
    }


def test_prometheus_scrapes_a_pod_once_and_fills_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = find_program("prometheus")
    if not binary:
        pytest.skip("no prometheus on the PATH or in ~/go/bin; .ci/run says how")
    port, own = find_free_port(), find_free_port()
    address = f"http://127.0.0.1:{own}"
    monkeypatch.setenv(PORT_ENV, str(port))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    command = [binary, f"--config.file={configured(tmp_path, port)}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    progress = Progress("score", 10_000)
    with (
        serve_metrics("score", "score-0"),
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{own}", "--log.level=error"]) as process,
    ):
        try:
            # A scrape that a busy machine lets time out is made up for by the next.
            empty, until = {**panels(), "pods": "count(max_over_time(up[1h]) == 1) == 2"}, time.monotonic() + LIMIT_S
            while empty and time.monotonic() < until:
                progress.update(3)
                progress.add_seconds(read=0.2, decode=0.3)
                found = {
                    title: asked(address, f"query?query={urllib.parse.quote(expr)}") for title, expr in empty.items()
                }
                empty = {title: expr for title, expr in empty.items() if not found[title].get("result")}
                time.sleep(0.5)
            targets = asked(address, "targets")["activeTargets"]
        finally:
            process.terminate()
    assert empty == {}
    assert sorted((one["labels"]["pod"], one["scrapeUrl"]) for one in targets) == [
        ("score", f"http://127.0.0.1:{port}/metrics"),
        ("train-0", f"http://127.0.0.2:{port}/metrics"),
    ], "one target a pod; of a training's nodes the first"
