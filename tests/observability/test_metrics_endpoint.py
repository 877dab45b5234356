"""Test the metrics that Prometheus scrapes from every stage in its own process."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from semiscale import storage
from semiscale.observability import prometheus
from semiscale.observability.progress import Progress
from tests.support.proxies import serve_delayed
from tests.support.servers import find_free_port
from tests.support.stages import Stages

DASHBOARD = Path(__file__).resolve().parents[2] / "manifests" / "grafana" / "dashboard.json"
# A busy machine can need this time.
LIMIT_S = 300
Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(autouse=True)
def _reset_progress() -> Iterator[None]:
    """Remove the counts of other tests."""
    Progress.latest = None
    yield
    Progress.latest = None


def scrape(port: int) -> Samples:
    """Scrape as Prometheus does, and return the samples of each metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a finished run. The tests run its stages again in other workdirs."""
    short = {"teacher_images_processed": 24, "pretrain_images_processed": 24, "finetune_epochs": 1}
    stages = Stages(tmp_path_factory.mktemp("run"), **short)
    assert stages.report
    return stages


def stage_options(stages: Stages, stage: str) -> dict[str, Any]:
    """Return the options of a stage, without its workdir."""
    uri = stages.uri
    if stage == "plan":
        return stages.config.model_dump(exclude={"workdir"})
    models = {"teacher": uri(stages.teacher), "pretrained": uri(stages.pretrained)}
    sweeps = {name: [uri(receipt) for receipt in getattr(stages, name)] for name in ("baselines", "students")}
    scores, evaluation = [uri(receipt) for receipt in stages.scores], uri(stages.evaluation)
    selection = {"selection": uri(stages.selection)}
    later = {"packed": uri(stages.packed), "evaluation": evaluation, "promotion": uri(stages.promotion)}
    options: dict[str, dict[str, Any]] = {
        "merge": {"scores": scores, "images_per_class": 12, "classes_per_image": 2, "max_failed_fraction": 0.0},
        "pack": selection,
        "evaluate": {**models, **sweeps},
        "promote": {"evaluation": evaluation},
        "report": {**models, **sweeps, **selection, **later, "scores": scores},
    }
    return {"plan": uri(stages.plan), **options[stage]}


def stage_command(stage: str, workdir: str, options: dict[str, Any]) -> list[str]:
    """Return the command line of a stage."""
    values = {"workdir": workdir, **options}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return [
        sys.executable,
        "-m",
        f"semiscale.stages.{stage}",
        *(f"--{k.replace('_', '-')}={v}" for k, v in texts.items()),
    ]


@pytest.mark.parametrize(
    ("stage", "last", "unit", "parts"),
    [
        ("plan", "plan/[0-9a-f]+/receipt.json", "images", {"decode", "list"}),
        ("merge", "merge/[0-9a-f]+/receipt.json", "shard groups", {"remove", "open", "select", "locate", "write"}),
        ("pack", "pack/[0-9a-f]+/receipt.json", "images", {"read", "write"}),
        # The evaluation reuses stored predictions.
        ("evaluate", "evaluate/[0-9a-f]+/receipt.json", "predictions", set()),
        ("promote", "champions/", "predictions", set()),
        ("report", "trial/report.html", "gallery images", set()),
    ],
)  # fmt: skip
def test_a_stage_serves_its_progress(
    stages: Stages, s3_server: str, s3_bucket: str, stage: str, last: str, unit: str, parts: set[str]
) -> None:
    """The store holds the last write of each stage.

    The stage is still running at the scrape.
    """
    plan, port = stages.plan, find_free_port()
    labeled = plan.train.samples + plan.validation.samples + plan.test.samples
    groups, rows = len(json.loads(storage.read_bytes(plan.units))), stages.selection.images
    measured = {"evaluate": 4 * plan.test.samples, "promote": 2 * plan.test.samples}
    for path in (Path(stages.workdir) / "stages/evaluate/predictions").iterdir() if stage in measured else []:
        storage.upload(path, f"{s3_bucket}/stages/evaluate/predictions/{path.name}")
    with serve_delayed(s3_server) as proxy:
        proxy.stall(f"^PUT .*/{last}")
        environment = {**os.environ, prometheus.PORT_ENV: str(port), "AWS_ENDPOINT_URL": proxy.address}
        command = stage_command(stage, s3_bucket, stage_options(stages, stage))
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout
            try:
                assert proxy.held.wait(LIMIT_S)
                samples = scrape(port)
            finally:
                proxy.resume()
                output = process.stdout.read()
    assert process.returncode == 0, output
    task = {"stage": stage, "task": "pack-0" if stage == "pack" else stage}
    ((labels, elapsed_s),) = samples["semiscale_elapsed_seconds"]
    assert (labels, elapsed_s > 0) == (task, True)
    ((labels, done),) = samples["semiscale_done_total"]
    assert labels == {**task, "unit": unit}
    expected = {"plan": labeled, "merge": groups, "pack": rows, **measured}
    assert done == expected.get(stage, done) > 0
    assert samples["semiscale_expected"] == [(labels, 0 if stage == "plan" else done)]
    assert samples["semiscale_failed_total"] == [(labels, 0)]
    assert {labels["part"] for labels, _ in samples.get("semiscale_part_seconds_total", [])} == parts


def test_a_task_serves_metrics_before_its_first_count_and_only_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv(prometheus.PORT_ENV, str(port))
    # Two tasks use the same port one after the other.
    for _ in range(2):
        with prometheus.serve_metrics("score", "score-3"):
            (elapsed,) = scrape(port)["semiscale_elapsed_seconds"]
            assert elapsed[0] == {"stage": "score", "task": "score-3"}
            assert "semiscale_done_total" not in scrape(port)
        with pytest.raises(OSError, match="refused"):
            scrape(port)


def test_a_launcher_frees_its_port_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv(prometheus.PORT_ENV, str(port))
    with prometheus.serve_metrics("train", "train-teacher-0.1"):
        prometheus.stop_serving()
        with socket.create_server(("127.0.0.1", port)):
            pass


@pytest.mark.parametrize("port", ["taken", "none"])
def test_a_task_works_if_its_metrics_cannot_be_served(
    port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setenv(prometheus.PORT_ENV, str(taken.getsockname()[1]) if port == "taken" else "none")
        with prometheus.serve_metrics("score", "score-0"):
            pass
    assert "score · no metrics: SEMISCALE_METRICS_PORT=" in capsys.readouterr().out


def test_the_dashboard_draws_metrics_that_exist() -> None:
    Progress("score", 1).add_seconds(read=1.0)
    families = list(prometheus.TaskCollector("score", "score-0").collect())
    exist = {sample.name for family in families for sample in family.samples}
    drawn: set[str] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            names = set(re.findall(r"\bsemiscale_\w+", target["expr"]))
            assert names, target["expr"]
            assert names <= exist, target["expr"]
            drawn |= names
    assert drawn == exist, "every metric has a panel"
