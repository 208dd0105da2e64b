"""What is timed: a network in an engine, at a precision, with so many images and threads."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mobilevit.errors import MobileViTError
from mobilevit.exporting.export import FORMATS
from mobilevit.runtime.artifact import Format

Engine = Literal["eager", "compile", "onnx", "openvino", "executorch", "litert", "pt2"]
"""PyTorch as it is, PyTorch through `torch.compile`, or the runtime of an exported format."""

Precision = Literal["fp32", "bf16", "fp16", "int8"]

Origin = Literal["mobilevit", "timm", "transformers", "cvnets"]
"""Whose code the network is."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CUDA_ENGINES: tuple[Engine, ...] = ("eager", "compile", "onnx", "pt2")
PEER_ENGINES: tuple[Engine, ...] = ("eager", "compile", "onnx", "openvino")
"""Peers come to the other formats by no road that their users take."""

_PACKAGES: dict[Engine, tuple[str, ...]] = {
    "eager": (),
    "compile": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "pt2": (),
}
"""Modules that convert to a format and run it."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Whose network, with which weights."""

    label: str
    """What people call it; each has its own."""
    origin: Origin
    architecture: str
    """A key of `MODELS`, or a name of timm's."""
    image_size: tuple[int, int]
    """(height, width) of the input in pixels."""
    checkpoint: str | None = None
    """File of this package whose weights it gets, whoever's code it is; None: fresh weights."""
    weights: str = ""
    """What its answers may be compared with: networks with the same word here compute the same."""
    channels_last: bool = False
    """Memory layout of weights and images; ours are always channels-last."""
    clone: str | None = None
    """Of ml-cvnets: its folder."""
    published_top1: float | None = None
    """0..1, on ImageNet, if it is to be shown."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of those that are timed in turns."""

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
        """Network, engine and precision; unique among contenders with the same batch and threads."""
        return f"{self.network.label} {self.engine} {self.precision}"

    @property
    def case(self) -> tuple[int, int]:
        """Batch size and threads: those who share them are compared."""
        return self.batch_size, self.threads

    @property
    def format(self) -> Format | None:
        """What to export to; None: PyTorch runs it as it is."""
        return format_of(self.engine)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Contender:
        """The inverse of `to_dict`."""
        network = values["network"]
        height, width = network["image_size"]
        return cls(**{**values, "network": Network(**{**network, "image_size": (height, width)})})


def format_of(engine: Engine) -> Format | None:
    """What to export to for an engine; None: PyTorch runs the model itself."""
    return None if engine == "eager" or engine == "compile" else engine


def missing(engine: Engine, device: str = "cpu") -> str:
    """Why an engine cannot run here, with a remedy; empty if it can."""
    absent = [module for module in _PACKAGES[engine] if importlib.util.find_spec(module) is None]
    if absent:
        return f"{engine}: {' and '.join(absent)} not installed; pip install 'mobilevit[{engine}]'"
    if engine == "compile" and device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        return "compile: no C++ compiler here; install g++ or clang++"
    if device != "cpu" and engine not in CUDA_ENGINES:
        return f"{engine}: is measured on the CPU only; leave --device out"
    return ""


def pick_engines(wanted: Sequence[str], device: str) -> tuple[list[Engine], list[str]]:
    """The engines a user named, and lines on those that "all" had to leave out.

    Raises:
        ValueError: one is unknown, or was named and is not installed.
    """
    if not wanted:
        raise MobileViTError(f"no engine is named; choose all, or from {', '.join(ENGINES)}")
    for name in wanted:
        if name not in (*ENGINES, "all"):
            raise MobileViTError(f"unknown engine {name!r}; choose all, or from {', '.join(ENGINES)}")
    named = ENGINES if "all" in wanted else [engine for engine in ENGINES if engine in wanted]
    why = {engine: missing(engine, device) for engine in named}
    left_out = [reason for reason in why.values() if reason]
    if left_out and "all" not in wanted:
        raise MobileViTError(left_out[0])
    return [engine for engine in named if not why[engine]], left_out


def has_precision(engine: Engine, precision: Precision, device: str) -> bool:
    """Whether an engine computes in it there."""
    its_format = format_of(engine)
    if its_format is None:
        return precision in (("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16"))
    return precision in FORMATS[its_format].precisions


def enter(
    networks: Sequence[Network],
    engines: Sequence[Engine],
    precisions: Sequence[Precision],
    *,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    device: str,
) -> tuple[list[Contender], list[str]]:
    """Everyone who takes part, the baseline of each case first, and lines on what there is not.

    The baseline is the first network in plain PyTorch in float32, where that takes part.
    """
    left_out = [
        f"{engine} has no {precision}" + (" on the CPU" if device == "cpu" and engine in ("eager", "compile") else "")
        for engine, precision in itertools.product(engines, precisions)
        if not has_precision(engine, precision, device)
    ]
    contenders = []
    for batch_size, count in itertools.product(batch_sizes, threads):
        for engine, precision, network in itertools.product(engines, precisions, networks):
            ours = network.origin == "mobilevit"
            if not has_precision(engine, precision, device) or not (ours or engine in PEER_ENGINES):
                continue
            # What int8 costs depends on the layers that stay in floating point, which are chosen for our own model;
            # and a memory layout is PyTorch's affair.
            if not ours and (precision == "int8" or (network.label.endswith("channels_last") and engine != "eager")):
                continue
            contenders.append(
                Contender(
                    network=network,
                    engine=engine,
                    precision=precision,
                    batch_size=batch_size,
                    threads=count,
                    device=device,
                )
            )
    return contenders, left_out


def size_of(artifact: str) -> int:
    """Bytes of an exported file, with what belongs to it."""
    path = Path(artifact)
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)
