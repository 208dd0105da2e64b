"""`mobilevit tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.cli.labeled import measure_on
from mobilevit.cli.printing import print_json, print_rows


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Find the fastest engine for a checkpoint on this machine that keeps its answers; --engine auto then uses it."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    engines: tuple[Literal["all", "onnx", "openvino", "executorch", "litert", "pt2"], ...] = ("all",)
    """all: those that are installed; PyTorch takes part always."""
    precisions: tuple[Literal["fp32", "bf16", "fp16", "int8"], ...] = ("fp32", "bf16", "fp16", "int8")
    """int8 takes part with --calibration only."""
    max_loss: float = 0.01
    """What may be lost of accuracy (with --data) or of agreement with float32 PyTorch: 0.01 is one in a hundred."""
    batch_size: int = 1
    """Images in a run."""
    threads: int | None = None
    """To compute with; all cores and half of them are tried, if not given."""
    images: Path | None = None
    """Folder of images to compare answers on; built-in photographs, or those of --calibration, if not given."""
    calibration: Path | None = None
    """int8: a folder of images of what the model will see."""
    data: str | None = None
    """Labeled images, as for training: --max-loss is then of accuracy."""
    rounds: int = 10
    """Turns of each engine."""
    out: Path | None = None
    """Folder for the result instead of the checkpoint's, where --engine auto looks."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure, keep the winner, print."""
        from mobilevit import factory
        from mobilevit.benchmarking.tune import tune
        from mobilevit.card import card_of

        tuned = tune(
            self.checkpoint,
            out=self.out,
            images=self.images,
            calibration=self.calibration,
            max_loss=self.max_loss,
            batch_size=self.batch_size,
            threads=self.threads,
            engines=self.engines,
            precisions=self.precisions,
            evaluate=None if self.data is None else measure_on(self.data, card_of(factory.load(self.checkpoint))),
            rounds=self.rounds,
        )
        if self.json:
            print_json(tuned.to_dict())
            return 0
        print_rows(*tuned.table())
        for name, why in tuned.dropped:
            print(f"left out: {name}: {why}")
        print(f"\nfastest: {tuned.engine}, {tuned.precision}, {tuned.threads} threads: {tuned.median_ms:.1f} ms")
        print(f"{tuned.path}  (used by --engine auto on this machine)")
        return 0
