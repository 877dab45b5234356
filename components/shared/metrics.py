"""A task's progress for Prometheus, on the port that SEMISCALE_METRICS_PORT names; without it nothing listens.

`manifests/grafana/dashboard.json` draws these metrics. They are read at each scrape from the latest Progress, so that
counting costs the work nothing.
"""

import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from components.shared.progress import Progress, say

PORT = "SEMISCALE_METRICS_PORT"
LABELS = ("stage", "task")


class TaskMetrics(Collector):
    """What one task tells at a scrape."""

    def __init__(self, stage: str, task: str) -> None:
        self._labels = (stage, task)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, without samples before the task has any progress."""
        images = CounterMetricFamily("semiscale_images", "Images processed.", labels=LABELS)
        failures = CounterMetricFamily("semiscale_failed_images", "Images that could not be used.", labels=LABELS)
        clocks = CounterMetricFamily(
            "semiscale_part_seconds", "Thread-seconds spent reading, decoding, forwarding, writing.",
            labels=(*LABELS, "part"),
        )  # fmt: skip
        expected = GaugeMetricFamily("semiscale_expected_images", "Images to process; 0: not known.", labels=LABELS)
        rate = GaugeMetricFamily("semiscale_images_per_second", "Images a second since the start.", labels=LABELS)
        if latest := Progress.latest:
            images.add_metric(self._labels, latest.done)
            failures.add_metric(self._labels, latest.failures)
            expected.add_metric(self._labels, latest.total)
            rate.add_metric(self._labels, latest.rate())
            for part, seconds in latest.clocks.copy().items():
                clocks.add_metric((*self._labels, part), seconds)
        yield from (images, failures, clocks, expected, rate)


def serve(stage: str, task: str) -> None:
    """Listen on the port that the environment names. A port that is taken is said, and the work goes on."""
    port = os.environ.get(PORT, "")
    if not port:
        return
    registry = CollectorRegistry()
    registry.register(TaskMetrics(stage, task))
    try:
        start_http_server(int(port), registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        say(stage, f"no metrics: {PORT}={port}: {error}")
