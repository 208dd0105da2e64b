"""What came of a benchmark: figures, a table of them, and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobilevit.benchmarking.rounds import Failure, Measurement
from mobilevit.errors import MobileViTError
from mobilevit.files import write_json
from mobilevit.machine import Machine


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """Every figure, and how it was measured."""

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
    """What does not take part, and why; a line each."""

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Batch size and threads of those that were timed side by side, in their order."""
        return list(dict.fromkeys(measurement.contender.case for measurement in self.measurements))

    def of_case(self, case: tuple[int, int]) -> list[Measurement]:
        """The measurements of a batch size and a number of threads, the fastest first."""
        found = [measurement for measurement in self.measurements if measurement.contender.case == case]
        return sorted(found, key=lambda measurement: measurement.median_ms / measurement.contender.batch_size)

    def table(self, case: tuple[int, int]) -> tuple[list[str], list[list[str]]]:
        """What to print of a case: the heading, and rows of text."""
        measurements = self.of_case(case)
        metric = next((name for m in measurements for name in m.metrics), None)
        on_gpu = any(m.gpu_memory is not None for m in measurements)
        heading = ["", "engine", "precision", "ms", "half of runs, ms", "images/s", "x", "start, s", "memory, MB"]
        heading += ["GPU, MB"] * on_gpu + ["weights, MB", "deviation"] + ([] if metric is None else [metric])
        rows = []
        for m in measurements:
            low, high = m.quartiles_ms
            row = [m.contender.network.label, m.contender.engine, m.contender.precision, _figure(m.median_ms)]
            row += [f"{_figure(low)} to {_figure(high)}", _figure(m.images_per_second)]
            row += ["-" if m.speedup is None else f"{m.speedup:.2f}", f"{m.start_s:.1f}", f"{m.memory / 1e6:.0f}"]
            if on_gpu:
                row.append("-" if m.gpu_memory is None else f"{m.gpu_memory / 1e6:.0f}")
            row += [f"{m.weight_bytes / 1e6:.1f}", "-" if m.deviation is None else f"{m.deviation:.0e}"]
            if metric is not None:
                row.append(f"{m.metrics[metric]:.4f}" if metric in m.metrics else "-")
            rows.append(row)
        return heading, rows

    def notes(self) -> list[str]:
        """What to say below the tables: who failed, who was left out."""
        told = dict.fromkeys(f"{failure.contender.name}: {failure.reason}" for failure in self.failures)
        return [*(f"failed: {line}" for line in told), *(f"left out: {line}" for line in self.left_out)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {
            **asdict(self),
            "measurements": [measurement.to_dict() for measurement in self.measurements],
            "failures": [failure.to_dict() for failure in self.failures],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BenchmarkReport:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **values,
                "machine": Machine(**{**values["machine"], "gpus": tuple(values["machine"]["gpus"])}),
                "measurements": tuple(map(Measurement.from_dict, values["measurements"])),
                "failures": tuple(map(Failure.from_dict, values["failures"])),
                "left_out": tuple(values["left_out"]),
            }
        )

    def save(self, folder: Path) -> None:
        """Write `benchmark.json` and `benchmark.png`, each whole or not at all."""
        from mobilevit.benchmarking.plot import save_plot

        write_json(folder / "benchmark.json", self.to_dict())
        save_plot(self, folder / "benchmark.png")


def read_report(path: str | os.PathLike[str]) -> BenchmarkReport:
    """What `BenchmarkReport.save` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        return BenchmarkReport.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, OSError):
        raise MobileViTError(f"{path}: cannot be read as a result of mobilevit benchmark") from None


def case_title(case: Sequence[int], device: str) -> str:
    """What to write above a case's figures."""
    batch, threads = case
    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    return f"batch {batch}, {where}"


def _figure(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
