"""Serve the metrics of a task to Prometheus on SEMISCALE_METRICS_PORT.

Without that variable no port is opened. Metrics are read from the latest Progress at each scrape, so they do not slow
down the work. `manifests/grafana/dashboard.json` displays them.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from semiscale.observability.progress import Progress, log_info

PORT_ENV = "SEMISCALE_METRICS_PORT"
LABELS = ("stage", "task")
# The label `unit` is the plural name of the items that are counted, such as `images`.
COUNTER_LABELS = (*LABELS, "unit")

# The servers of this process, at most one. Training stops it before its first rank serves the metrics.
_servers: list[tuple[WSGIServer, Thread]] = []


class TaskCollector(Collector):
    """Collects the metrics of one task at a scrape."""

    def __init__(self, stage: str, task: str) -> None:
        self._labels, self._started = (stage, task), time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric.

        The metrics of progress have no samples before the task has a Progress.
        """
        elapsed = GaugeMetricFamily("semiscale_elapsed_seconds", "Since the task began in this pod.", labels=LABELS)
        done = CounterMetricFamily("semiscale_done", "What is finished, images mostly.", labels=COUNTER_LABELS)
        failed = CounterMetricFamily("semiscale_failed", "What could not be used.", labels=COUNTER_LABELS)
        parts = CounterMetricFamily(
            "semiscale_part_seconds", "Spent on each part of the work; thread-seconds where threads share one.",
            labels=(*LABELS, "part"),
        )  # fmt: skip
        expected = GaugeMetricFamily("semiscale_expected", "What there is to do; 0: not known.", labels=COUNTER_LABELS)
        rate = GaugeMetricFamily("semiscale_done_per_second", "Since the start.", labels=COUNTER_LABELS)
        elapsed.add_metric(self._labels, time.monotonic() - self._started)
        if latest := Progress.latest:
            labels = (*self._labels, latest.unit)
            done.add_metric(labels, latest.done)
            failed.add_metric(labels, latest.failures)
            expected.add_metric(labels, latest.total)
            rate.add_metric(labels, latest.rate())
            for part, seconds in latest.clocks.copy().items():
                parts.add_metric((*self._labels, part), seconds)
        yield from (elapsed, done, failed, parts, expected, rate)


@contextmanager
def serve_metrics(stage: str, task: str) -> Iterator[None]:
    """Serve a task's metrics inside the block.

    A port that cannot be opened is logged, and the work continues without metrics.

    Args:
        stage: Name of the stage, for the label `stage`.
        task: Name of the task, for the label `task`.
    """
    if port := os.environ.get(PORT_ENV, ""):
        registry = CollectorRegistry()
        registry.register(TaskCollector(stage, task))
        try:
            _servers.append(start_http_server(int(port), registry=registry))
        except (OSError, ValueError, OverflowError) as error:
            log_info(stage, f"no metrics: {PORT_ENV}={port}: {error}")
    try:
        yield
    finally:
        stop_serving()


def stop_serving() -> None:
    """Close the port.

    Another process of the machine can then serve the metrics, such as rank 0 of a training.
    """
    while _servers:
        server, thread = _servers.pop()
        server.shutdown()
        server.server_close()
        thread.join()
