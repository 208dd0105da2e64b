"""Metrics for Prometheus; with several workers, summed over all of them."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Folder where workers keep their counts; prometheus_client reads the variable when it is imported."""

_LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 64)


disable_created_metrics()  # type: ignore[no-untyped-call]  # creation times of counters would double the text


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mobilevit_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "mobilevit_request_seconds", "Time to answer a request.", ("route",), buckets=_LATENCIES, registry=registry
        )
        self._images = Counter("mobilevit_images", "Images.", ("model", "outcome"), registry=registry)
        self._batches = Histogram(
            "mobilevit_batch_images", "Images in a batch.", ("model",), buckets=_BATCHES, registry=registry
        )
        self._compute = Histogram(
            "mobilevit_compute_seconds", "Time to compute a batch.", ("model",), buckets=_LATENCIES, registry=registry
        )
        self._queue = Gauge(
            "mobilevit_queue_images",
            "Images accepted and not yet answered.",
            ("model",),
            registry=registry,
            multiprocess_mode="livesum",
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, method, status).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, model: str, count: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self._batches.labels(model).observe(count)
        self._compute.labels(model).observe(seconds)

    def images(self, model: str, outcome: str, count: int) -> None:
        """Count images that were answered; the outcome is "ok" or "unreadable"."""
        self._images.labels(model, outcome).inc(count)

    def queue(self, model: str, length: int) -> None:
        """Set the number of images that are accepted and not yet answered."""
        self._queue.labels(model).set(length)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        if DIRECTORY_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


def forget_worker(pid: int, directory: Path) -> None:
    """Remove the queue of a dead worker from the sums; its counts stay."""
    mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
