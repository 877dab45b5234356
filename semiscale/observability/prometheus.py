"""Serve the metrics of a task to Prometheus on SEMISCALE_METRICS_PORT.

Without that variable nothing listens. Metrics are read from the latest Progress at each scrape, so counting costs the
work nothing. `manifests/grafana/dashboard.json` draws them.
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
COUNTER_LABELS = (*LABELS, "unit")  # of what: images, units

_listening: list[tuple[WSGIServer, Thread]] = []  # of this process: a task does one thing at a time


class TaskCollector(Collector):
    """What one task tells at a scrape."""

    def __init__(self, stage: str, task: str) -> None:
        self._labels, self._began = (stage, task), time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; before the task has counted anything, those of its progress without samples."""
        elapsed = GaugeMetricFamily("semiscale_elapsed_seconds", "Since the task began in this pod.", labels=LABELS)
        done = CounterMetricFamily("semiscale_done", "What is finished, images mostly.", labels=COUNTER_LABELS)
        failed = CounterMetricFamily("semiscale_failed", "What could not be used.", labels=COUNTER_LABELS)
        parts = CounterMetricFamily(
            "semiscale_part_seconds", "Spent on each part of the work; thread-seconds where threads share one.",
            labels=(*LABELS, "part"),
        )  # fmt: skip
        expected = GaugeMetricFamily("semiscale_expected", "What there is to do; 0: not known.", labels=COUNTER_LABELS)
        rate = GaugeMetricFamily("semiscale_done_per_second", "Since the start.", labels=COUNTER_LABELS)
        elapsed.add_metric(self._labels, time.monotonic() - self._began)
        if latest := Progress.latest:
            counted = (*self._labels, latest.unit)
            done.add_metric(counted, latest.done)
            failed.add_metric(counted, latest.failures)
            expected.add_metric(counted, latest.total)
            rate.add_metric(counted, latest.rate())
            for part, seconds in latest.clocks.copy().items():
                parts.add_metric((*self._labels, part), seconds)
        yield from (elapsed, done, failed, parts, expected, rate)


@contextmanager
def serve_metrics(stage: str, task: str) -> Iterator[None]:
    """Offer a task's metrics for the length of a `with`. A port that is taken is said, and the work goes on."""
    if port := os.environ.get(PORT_ENV, ""):
        registry = CollectorRegistry()
        registry.register(TaskCollector(stage, task))
        try:
            _listening.append(start_http_server(int(port), registry=registry))
        except (OSError, ValueError, OverflowError) as error:
            log_info(stage, f"no metrics: {PORT_ENV}={port}: {error}")
    try:
        yield
    finally:
        stop_serving()


def stop_serving() -> None:
    """Listen no more: from here on another process of this machine tells, such as the first rank of a training."""
    while _listening:
        server, thread = _listening.pop()
        server.shutdown()
        server.server_close()
        thread.join()
