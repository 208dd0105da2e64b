"""`mobilevit tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mobilevit.benchmarking.config import TuneConfig
from mobilevit.cli.printing import print_json, print_rows


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Find the fastest engine for a checkpoint on this machine that keeps its answers; --engine auto then uses it."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    settings: Annotated[TuneConfig, arg(name="")] = field(default_factory=TuneConfig)
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure, keep the winner, print."""
        from mobilevit.benchmarking.tune import tune

        tuned = tune(self.checkpoint, self.settings)
        if self.json:
            print_json(tuned.to_dict())
            return 0
        print_rows(*tuned.table())
        for name, why in tuned.dropped:
            print(f"left out: {name}: {why}")
        contender, median_ms = tuned.fastest.contender, tuned.fastest.median_ms
        print(f"\nfastest: {contender.engine}, {contender.precision}, {contender.threads} threads: {median_ms:.1f} ms")
        print(f"{tuned.path}  (used by --engine auto on this machine)")
        return 0
