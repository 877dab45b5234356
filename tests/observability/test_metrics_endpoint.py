"""What Prometheus scrapes: every stage, in a process of its own, tells how far it is while it works."""

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
LIMIT_S = 300  # on a machine that is busy with other things
Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(autouse=True)
def no_progress() -> Iterator[None]:
    """What another test counted is not this one's."""
    Progress.latest = None
    yield
    Progress.latest = None


def scraped(port: int) -> Samples:
    """Scrape as Prometheus does; returns every sample of a metric, with its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A finished run, whose stages are asked for once more in other workdirs."""
    briefly = {"teacher_images_processed": 24, "pretrain_images_processed": 24, "finetune_epochs": 1}
    stages = Stages(tmp_path_factory.mktemp("run"), **briefly)
    assert stages.report
    return stages


def options_of(stages: Stages, stage: str) -> dict[str, Any]:
    """Return what a stage is asked for, beyond its workdir."""
    uri = stages.uri
    if stage == "plan":
        return stages.config.model_dump(exclude={"workdir"})
    models = {"teacher": uri(stages.teacher), "pretrained": uri(stages.pretrained)}
    swept = {name: [uri(one) for one in getattr(stages, name)] for name in ("baselines", "students")}
    scores, evaluation = [uri(one) for one in stages.scores], uri(stages.evaluation)
    selection = {"selection": uri(stages.selection)}
    later = {"packed": uri(stages.packed), "evaluation": evaluation, "promotion": uri(stages.promotion)}
    asked: dict[str, dict[str, Any]] = {
        "merge": {"scores": scores, "images_per_class": 12, "classes_per_image": 2, "max_failed_fraction": 0.0},
        "pack": selection,
        "evaluate": {**models, **swept},
        "promote": {"evaluation": evaluation},
        "report": {**models, **swept, **selection, **later, "scores": scores},
    }
    return {"plan": uri(stages.plan), **asked[stage]}


def command(stage: str, workdir: str, options: dict[str, Any]) -> list[str]:
    """Return a stage's command line."""
    given = {"workdir": workdir, **options}
    told = {name: one if isinstance(one, str) else json.dumps(one) for name, one in given.items()}
    return [
        sys.executable,
        "-m",
        f"semiscale.stages.{stage}",
        *(f"--{k.replace('_', '-')}={v}" for k, v in told.items()),
    ]


@pytest.mark.parametrize(
    ("stage", "last", "unit", "parts"),
    [
        ("plan", "plan/[0-9a-f]+/receipt.json", "images", {"decode", "list"}),
        ("merge", "merge/[0-9a-f]+/receipt.json", "units opened", {"remove", "open", "select", "locate", "write"}),
        ("pack", "pack/[0-9a-f]+/receipt.json", "images", {"read", "write"}),
        ("evaluate", "evaluate/[0-9a-f]+/receipt.json", "images", set()),  # of predictions that are kept
        ("promote", "champions/", "images", set()),
        ("report", "trial/report.html", "images", set()),
    ],
)  # fmt: skip
def test_a_stage_tells_how_far_it_is(
    stages: Stages, s3_server: str, s3_bucket: str, stage: str, last: str, unit: str, parts: set[str]
) -> None:
    """Each is held where it writes what it leaves, so that it is at work when it is scraped."""
    plan, port = stages.plan, find_free_port()
    labeled = plan.train.samples + plan.validation.samples + plan.test.samples
    units, rows = len(json.loads(storage.read_bytes(plan.units))), stages.selection.images
    measured = {"evaluate": 4 * plan.test.samples, "promote": 2 * plan.test.samples}
    for kept in (Path(stages.workdir) / "stages/evaluate/predictions").iterdir() if stage in measured else []:
        storage.upload(kept, f"{s3_bucket}/stages/evaluate/predictions/{kept.name}")
    with serve_delayed(s3_server) as relay:
        relay.stall(f"^PUT .*/{last}")
        environment = {**os.environ, prometheus.PORT_ENV: str(port), "AWS_ENDPOINT_URL": relay.address}
        asked = command(stage, s3_bucket, options_of(stages, stage))
        with subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout
            try:
                assert relay.held.wait(LIMIT_S)
                found = scraped(port)
            finally:
                relay.resume()
                said = process.stdout.read()
    assert process.returncode == 0, said
    me = {"stage": stage, "task": "pack-0" if stage == "pack" else stage}
    ((labels, elapsed_s),) = found["semiscale_elapsed_seconds"]
    assert (labels, elapsed_s > 0) == (me, True)
    ((labels, done),) = found["semiscale_done_total"]
    assert labels == {**me, "unit": unit}
    expected = {"plan": labeled, "merge": units, "pack": rows, **measured}
    assert done == expected.get(stage, done) > 0
    assert found["semiscale_expected"] == [(labels, 0 if stage == "plan" else done)]
    assert found["semiscale_failed_total"] == [(labels, 0)]
    assert {one["part"] for one, _ in found.get("semiscale_part_seconds_total", [])} == parts


def test_a_task_tells_before_it_counts_anything_and_no_longer_than_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv(prometheus.PORT_ENV, str(port))
    for _ in range(2):  # one after the other at the same port
        with prometheus.serve_metrics("score", "score-3"):
            (elapsed,) = scraped(port)["semiscale_elapsed_seconds"]
            assert elapsed[0] == {"stage": "score", "task": "score-3"}
            assert "semiscale_done_total" not in scraped(port)
        with pytest.raises(OSError, match="refused"):
            scraped(port)


def test_the_first_rank_of_a_training_tells_for_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv(prometheus.PORT_ENV, str(port))
    with prometheus.serve_metrics("train", "train-teacher-0.1"):
        prometheus.stop_serving()
        with socket.create_server(("127.0.0.1", port)):
            pass


@pytest.mark.parametrize("port", ["taken", "none"])
def test_metrics_that_cannot_be_served_fail_nothing(
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
