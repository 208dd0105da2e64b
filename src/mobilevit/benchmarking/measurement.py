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

    def figures(self) -> dict[str, object]:
        """Return all numbers but accuracy as plain values for JSON."""
        values = {**asdict(self), "images_per_second": round(self.images_per_second, 3)}
        return {name: value for name, value in values.items() if name not in ("contender", "metrics")}


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

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Batch size and threads of the contenders that were timed side by side, in their order."""
        return list(dict.fromkeys(measurement.contender.case for measurement in self.measurements))

    def of_case(self, case: tuple[int, int]) -> list[Measurement]:
        """List the measurements of a case, the fastest first."""
        found = [measurement for measurement in self.measurements if measurement.contender.case == case]
        return sorted(found, key=lambda measurement: measurement.median_ms)

    def title(self, case: tuple[int, int]) -> str:
        """Describe a case."""
        batch, threads = case
        where = f"{threads} thread{'s' * (threads > 1)}" if self.device == "cpu" else self.device
        return f"batch {batch}, {where}"

    def table(self, case: tuple[int, int]) -> tuple[list[str], list[list[str]]]:
        """Format a case as a heading and rows of text."""
        measurements = self.of_case(case)
        metric = next((name for m in measurements for name in m.metrics), "")
        rows = [_row(m, metric) for m in measurements]
        used = [name for name in rows[0] if name != "GPU, MB" or any(m.gpu_memory is not None for m in measurements)]
        return used, [[row[name] for name in used] for row in rows]

    def notes(self) -> list[str]:
        """List what failed and what was left out."""
        failed = dict.fromkeys(f"failed: {failure.contender.name}: {failure.reason}" for failure in self.failures)
        return [*failed, *(f"left out: {line}" for line in self.left_out)]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        measurements = [{**asdict(m), **m.figures()} for m in self.measurements]
        return {**asdict(self), "measurements": measurements}


def _row(m: Measurement, metric: str) -> dict[str, str]:
    low, high = m.quartiles_ms
    row = {
        "": m.contender.network.label,
        "engine": m.contender.engine,
        "precision": m.contender.precision,
        "ms": digits(m.median_ms),
        "half of runs, ms": f"{digits(low)} to {digits(high)}",
        "images/s": digits(m.images_per_second),
        "x": "-" if m.speedup is None else f"{m.speedup:.2f}",
        "start, s": f"{m.start_s:.1f}",
        "memory, MB": f"{m.memory / 1e6:.0f}",
        "GPU, MB": "-" if m.gpu_memory is None else f"{m.gpu_memory / 1e6:.0f}",
        "weights, MB": f"{m.weight_bytes / 1e6:.1f}",
        "deviation": "-" if m.deviation is None else f"{m.deviation:.0e}",
    }
    if metric:
        row[metric] = f"{m.metrics[metric]:.4f}" if metric in m.metrics else "-"
    return row


def digits(value: float) -> str:
    """Format a number with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
