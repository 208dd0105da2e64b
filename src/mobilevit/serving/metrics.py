"""Metrics for Prometheus; with several workers, summed over all of them."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Folder where workers keep their counts; prometheus_client reads the variable when it is imported."""

_LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 64)
_OURS = CollectorRegistry()

disable_created_metrics()  # type: ignore[no-untyped-call]  # creation times of counters would double the text

REQUESTS = Counter("mobilevit_requests", "Requests answered.", ("route", "method", "status"), registry=_OURS)
SECONDS = Histogram(
    "mobilevit_request_seconds", "Time to answer a request.", ("route",), buckets=_LATENCIES, registry=_OURS
)
IMAGES = Counter("mobilevit_images", "Images.", ("model", "outcome"), registry=_OURS)
BATCHES = Histogram("mobilevit_batch_images", "Images in a batch.", ("model",), buckets=_BATCHES, registry=_OURS)
COMPUTE = Histogram(
    "mobilevit_compute_seconds", "Time to compute a batch.", ("model",), buckets=_LATENCIES, registry=_OURS
)
QUEUE = Gauge(
    "mobilevit_queue_images", "Images accepted and not yet answered.", ("model",), registry=_OURS,
    multiprocess_mode="livesum",
)  # fmt: skip


def metrics_text() -> bytes:
    """Return all metrics in the text format of Prometheus."""
    if DIRECTORY_VARIABLE not in os.environ:
        return generate_latest(_OURS)
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return generate_latest(together)
