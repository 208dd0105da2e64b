"""`mobilevit benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from mobilevit.benchmarking.config import BenchmarkConfig
from mobilevit.cli.printing import print_json, print_rows


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time a model in every engine of this machine, in turns with timm, transformers and Apple's own MobileViT."""

    model: Positional[str]
    """A checkpoint of this package, ml-cvnets, timm or transformers; or the name of a model, with fresh weights."""
    settings: Annotated[BenchmarkConfig, arg(name="")] = field(default_factory=BenchmarkConfig)
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure, print, write; 1 if some could not be measured."""
        from mobilevit.benchmarking.benchmark import benchmark
        from mobilevit.benchmarking.measurement import table

        report = benchmark(self.model, self.settings)
        if self.json:
            print_json(report.to_dict())
            return 1 if report.failures else 0
        for title, measurements in report.cases().items():
            print(f"\n{report.model}, {title}, {report.machine.processor}")
            print_rows(*table(measurements))
        for line in report.notes():
            print(line)
        if self.settings.out is not None:
            print(f"\nresults, plot and exported files: {self.settings.out}")
        return 1 if report.failures else 0
