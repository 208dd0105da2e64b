"""Networks, engines and precisions that are timed side by side."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from mobilevit.benchmarking.config import PRECISIONS, BenchmarkConfig, Precision
from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError, did_you_mean
from mobilevit.exporting.options import FORMATS
from mobilevit.machine import available_cores
from mobilevit.runtime.artifact import Format

Engine = Literal["eager", "compile", "onnx", "openvino", "executorch", "litert", "pt2"]
"""PyTorch as it is, PyTorch through `torch.compile`, or the engine of an exported format."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CUDA_ENGINES = ("eager", "compile", "onnx", "pt2")
_PEER_ENGINES = ("eager", "compile", "onnx", "openvino")  # users of peers have no way to the others

_PACKAGES: dict[Engine, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("litert_torch", "ai_edge_litert"),
}
"""Modules that convert to a format and run it."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """An implementation of a network, with its weights."""

    label: str
    """Its unique name in the report."""
    origin: Literal["mobilevit", "timm", "transformers", "cvnets"]
    """Package that it comes from."""
    architecture: str
    """A key of `MODELS`, or a name of timm."""
    image_size: tuple[int, int]
    """(height, width) of the input in pixels."""
    checkpoint: str | None = None
    """File of this package with its weights, whoever's code it is; None: fresh weights."""
    weights: str = ""
    """Networks with the same word here compute the same answers."""
    channels_last: bool = False
    """Memory layout of a peer's weights and images; ours are always channels-last."""
    clone: str | None = None
    """Folder of ml-cvnets."""
    published_top1: float | None = None
    """0..1, on ImageNet, if it is to be shown."""


def our_network(card: ModelCard, checkpoint: Path, image_size: tuple[int, int]) -> Network:
    """Describe a model of this package whose weights lie in a file."""
    return Network(
        label=card.name,
        origin="mobilevit",
        architecture=card.name,
        image_size=image_size,
        checkpoint=str(checkpoint),
        weights=checkpoint.stem,
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network in an engine, at a precision, with a number of images and threads."""

    network: Network
    engine: Engine
    precision: Precision = "fp32"
    batch_size: int = 1
    threads: int = 1
    device: str = "cpu"
    artifact: str | None = None
    """The exported file, for engines that run one."""

    @property
    def name(self) -> str:
        """Network, engine and precision; unique among contenders of the same case."""
        return f"{self.network.label} {self.engine} {self.precision}"

    @property
    def case(self) -> tuple[int, int]:
        """Batch size and threads: contenders with the same are compared."""
        return self.batch_size, self.threads

    @property
    def format(self) -> Format | None:
        """The format to export to; None: PyTorch runs the model itself."""
        return None if self.engine == "eager" or self.engine == "compile" else self.engine

    @property
    def of_file(self) -> Contender:
        """The same for all contenders that share an exported file."""
        # Engines on a CPU divide a batch into images, with one thread for each.
        whole = self.engine == "pt2" or self.device != "cpu"
        return replace(self, threads=1, batch_size=self.batch_size if whole else 1, artifact=None)


def _why_missing(engine: Engine, device: str) -> str:
    """Say why an engine cannot run here, with a remedy; empty if it can."""
    absent = [module for module in _PACKAGES.get(engine, ()) if importlib.util.find_spec(module) is None]
    if absent:
        return f"{engine}: {' and '.join(absent)} not installed; pip install 'mobilevit[{engine}]'"
    if engine == "compile" and device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        return "compile: no C++ compiler here; install g++ or clang++"
    if device != "cpu" and engine not in _CUDA_ENGINES:
        return f"{engine}: is measured on the CPU only; leave `device` out"
    return ""


def pick_engines(wanted: Sequence[str], device: str) -> tuple[list[Engine], list[str]]:
    """Find the engines that a user named, and say which of "all" are left out, and why.

    Raises:
        MobileViTError: one is unknown, or was named and is not installed.
    """
    for name in wanted:
        if name not in (*ENGINES, "all"):
            raise MobileViTError(
                f"unknown engine {name!r}; {did_you_mean(name, ENGINES)}choose all, or from {', '.join(ENGINES)}"
            )
    named = ENGINES if "all" in wanted else [engine for engine in ENGINES if engine in wanted]
    why = {engine: _why_missing(engine, device) for engine in named}
    left_out = [reason for reason in why.values() if reason]
    if left_out and "all" not in wanted:
        raise MobileViTError(left_out[0])
    return [engine for engine in named if not why[engine]], left_out


def has_precision(engine: Engine, precision: Precision, device: str) -> bool:
    """Whether an engine computes in a precision on a device."""
    if engine == "eager" or engine == "compile":
        return precision in (("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16"))
    return precision in FORMATS[engine].precisions


def enter(
    networks: Sequence[Network], engines: Sequence[Engine], config: BenchmarkConfig, device: str
) -> tuple[list[Contender], list[str]]:
    """List all contenders, the baseline of each case first, and a line on every combination that does not exist.

    The baseline is the first network in plain PyTorch in float32, if that takes part.
    """
    combinations = list(itertools.product(engines, [p for p in PRECISIONS if p in config.precisions]))
    left_out = [
        f"{engine} has no {precision}" + (" on the CPU" if device == "cpu" and engine in ("eager", "compile") else "")
        for engine, precision in combinations
        if not has_precision(engine, precision, device)
    ]
    contenders = [
        Contender(network=network, engine=engine, precision=precision, batch_size=batch, threads=threads, device=device)
        for batch, threads in itertools.product(config.batch_sizes, config.threads or [available_cores()])
        for engine, precision in combinations
        for network in networks
        if has_precision(engine, precision, device) and _takes_part(network, engine, precision)
    ]
    return contenders, left_out


def _takes_part(network: Network, engine: Engine, precision: Precision) -> bool:
    """Whether a peer is measured there; ours is everywhere."""
    if network.origin == "mobilevit":
        return True
    # The layers that stay in floating point, which decide what int8 costs, are chosen for our own model; and memory
    # layouts are for PyTorch alone.
    layout_matters = network.label.endswith("channels_last")
    return engine in _PEER_ENGINES and precision != "int8" and (engine == "eager" or not layout_matters)
