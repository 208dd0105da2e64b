"""Results of a benchmark: what was measured of each contender, as tables and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from mobilevit.benchmarking.contenders import Contender
from mobilevit.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed and memory of a contender."""

    contender: Contender
    median_ms: float
    """Median of the medians of its turns, for a whole batch."""
    quartiles_ms: tuple[float, float]
    """Half of all runs lie between these."""
    fastest_ms: float
    slowest_ms: float
    runs: int
    rounds: int
    speedup: float | None
    """Times as fast as the baseline of its case: the median of the rounds' own ratios; None: the baseline failed."""
    start_s: float
    """From loading to the first answer, compilation included."""
    memory: int
    """Most bytes its process held, with Python and PyTorch."""
    gpu_memory: int | None
    """Most bytes of tensors on the GPU."""
    weight_bytes: int
    """Size of the exported file, or of the weights in memory."""
    deviation: float | None
    """Largest difference of an answer from float32 PyTorch's on photographs, as a share of the largest answer."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Accuracy on labeled images, if there were any."""

    @property
    def images_per_second(self) -> float:
        """At this batch size."""
        return self.contender.batch_size / self.median_ms * 1e3

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {**asdict(self), "images_per_second": round(self.images_per_second, 3)}

    def row(self) -> dict[str, str]:
        """Format all figures as text, by the heading of their column."""
        low, high = self.quartiles_ms
        return {
            "": self.contender.network.label,
            "engine": self.contender.engine,
            "precision": self.contender.precision,
            "ms": digits(self.median_ms),
            "half of runs, ms": f"{digits(low)} to {digits(high)}",
            "images/s": digits(self.images_per_second),
            "x": "-" if self.speedup is None else f"{self.speedup:.2f}",
            "start, s": f"{self.start_s:.1f}",
            "memory, MB": f"{self.memory / 1e6:.0f}",
            **({} if self.gpu_memory is None else {"GPU, MB": f"{self.gpu_memory / 1e6:.0f}"}),
            "weights, MB": f"{self.weight_bytes / 1e6:.1f}",
            "deviation": "-" if self.deviation is None else f"{self.deviation:.0e}",
            **{name: f"{value:.4f}" for name, value in list(self.metrics.items())[:1]},
        }


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A contender that could not be measured."""

    contender: Contender
    reason: str
    """In one line."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """All measurements, and how they were made."""

    model: str
    """As the user named it."""
    task: str
    device: str
    rounds: int
    machine: Machine
    packages: dict[str, str]
    """Versions."""
    date: str
    """Such as "2025-01-31"."""
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]
    left_out: tuple[str, ...]
    """Combinations that do not take part, and why; a line each."""

    def cases(self) -> dict[str, list[Measurement]]:
        """Group what was timed side by side, the fastest first, by a title that tells their case."""
        cases: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            batch, threads = measurement.contender.case
            title = f"batch {batch}, {threads} thread{'s' * (threads > 1)}, {self.device}"
            cases.setdefault(title, []).append(measurement)
        return {title: sorted(found, key=lambda m: m.median_ms) for title, found in cases.items()}

    def notes(self) -> list[str]:
        """List what failed and what was left out."""
        failed = dict.fromkeys(f"failed: {failure.contender.name}: {failure.reason}" for failure in self.failures)
        return [*failed, *(f"left out: {line}" for line in self.left_out)]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {**asdict(self), "measurements": [measurement.to_dict() for measurement in self.measurements]}


def table(measurements: list[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Format measurements as a heading and rows of text; "-" stands for what was not measured."""
    rows = [measurement.row() for measurement in measurements]
    heading = list(dict.fromkeys(name for row in rows for name in row))
    return heading, [[row.get(name, "-") for name in heading] for row in rows]


def digits(value: float) -> str:
    """Format a number with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
