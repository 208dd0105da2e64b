"""`mobilevit benchmark`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.cli.labeled import measure_on
from mobilevit.cli.options import height_and_width
from mobilevit.cli.printing import print_json, print_rows
from mobilevit.errors import MobileViTError


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time a model in every engine of this machine, in turns with timm, transformers and Apple's own MobileViT."""

    model: Positional[str]
    """A checkpoint of this package, ml-cvnets, timm or transformers; or a model's name, which gets fresh weights."""
    task: Literal["classification", "detection", "segmentation"] = "classification"
    """Of a named model; a checkpoint has its own."""
    engines: tuple[Literal["all", "eager", "compile", "onnx", "openvino", "executorch", "litert", "pt2"], ...] = (
        "all",
    )
    """all: those that are installed."""
    precisions: tuple[Literal["fp32", "bf16", "fp16", "int8"], ...] = ("fp32",)
    """An engine takes part in those it has; int8 needs --calibration."""
    batch_sizes: tuple[int, ...] = (1,)
    """Images in a run."""
    threads: tuple[int, ...] = ()
    """Numbers of threads, one after the other; all cores if not given."""
    device: str = "cpu"
    """cpu, cuda or cuda:1."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. What the model was made for, if not given."""
    peers: bool = True
    """Classification: also timm's and transformers' MobileViT, if installed, with the same weights."""
    cvnets: Path | None = None
    """Classification: also Apple's MobileViT, from this clone of https://github.com/apple/ml-cvnets."""
    compare: bool = False
    """Classification: also MobileNetV2, DeiT-Ti and PiT-Ti, as the paper does; from timm."""
    patches: bool = False
    """Also the same model with the paper's patch configuration B (8, 4, 2)."""
    calibration: Path | None = None
    """int8: a folder of images of what the model will see."""
    data: str | None = None
    """Labeled images, as for training: also accuracy, of our model in each engine."""
    rounds: int = 15
    """Turns of each contender."""
    max_workers: int | None = None
    """Processes that may wait at a time; as memory allows, if not given."""
    out: Path | None = None
    """Folder for benchmark.json, benchmark.png and the exported files; nothing is kept, if not given."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure, print, write; 1 if some could not be measured."""
        from mobilevit import factory
        from mobilevit.benchmarking.benchmark import benchmark
        from mobilevit.benchmarking.report import case_title
        from mobilevit.card import card_of
        from mobilevit.models import MODELS

        image_size = height_and_width(self.image_size)
        measure = None
        if self.data is not None:
            if self.model in MODELS:
                raise MobileViTError(f"--data: {self.model} by name has fresh weights; name a checkpoint")
            measure = measure_on(self.data, card_of(factory.load(self.model)))
        report = benchmark(
            self.model,
            task=self.task,
            image_size=image_size,
            engines=self.engines,
            precisions=self.precisions,
            batch_sizes=self.batch_sizes,
            threads=self.threads,
            device=self.device,
            with_peers=self.peers,
            cvnets=self.cvnets,
            compare=self.compare,
            patches=self.patches,
            calibration=self.calibration,
            evaluate=measure,
            rounds=self.rounds,
            out=self.out,
            max_workers=self.max_workers,
        )
        if self.json:
            print_json(report.to_dict())
            return 1 if report.failures else 0
        for case in report.cases:
            print(f"\n{report.model}, {case_title(case, report.device)}, {report.machine.processor}")
            print_rows(*report.table(case))
        for line in report.notes():
            print(line)
        if self.out is not None:
            print(f"\nfigures, image and exported files: {self.out}")
        return 1 if report.failures else 0
