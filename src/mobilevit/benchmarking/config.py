"""Settings of `benchmark` and `tune`. The docstring of a field is its help on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError

Precision = Literal["fp32", "bf16", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Settings of `benchmark`."""

    task: TaskName = "classification"
    """Task of a model that is given by name; a checkpoint has its own."""
    engines: tuple[Literal["all", "eager", "compile", "onnx", "openvino", "executorch", "litert", "pt2"], ...] = (
        "all",
    )
    """eager is PyTorch, fused; all: those that are installed."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """An engine takes part in those it has; int8 needs calibration images."""
    batch_sizes: tuple[int, ...] = (1,)
    """Images in a run."""
    threads: tuple[int, ...] = ()
    """Numbers of threads, one after the other. Without it, all cores."""
    device: str = "cpu"
    """cpu, cuda or cuda:1; on a GPU, PyTorch, ONNX Runtime and pt2 take part."""
    image_size: int | tuple[int, int] | None = None
    """Side of the input in pixels, or height and width. Without it, the model's own."""
    peers: bool = True
    """Classification: also MobileViT of timm and transformers, if installed, with the same weights."""
    cvnets: Path | None = None
    """Classification: also Apple's MobileViT, from this clone of https://github.com/apple/ml-cvnets."""
    compare: bool = False
    """Classification: also MobileNetV2, DeiT-Ti and PiT-Ti, as in the paper; from timm."""
    calibration: Path | None = None
    """int8: a folder of images like those the model will see."""
    data: str | None = None
    """Labeled images, as for training: also measure the accuracy of our model in each engine."""
    rounds: int = 15
    """Turns of each contender."""
    max_workers: int | None = None
    """Processes that may wait at a time, 2 or more. Without it, as many as memory allows."""
    out: Path | None = None
    """Folder for benchmark.json, benchmark.png and the exported files. Without it, nothing is kept."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings of `tune`."""

    engines: tuple[Literal["all", "onnx", "openvino", "executorch", "litert", "pt2"], ...] = ("all",)
    """all: those that are installed. PyTorch always takes part."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")
    """int8 takes part only with calibration images."""
    max_loss: float = 0.01
    """Accepted loss of accuracy (with labeled data) or of agreement with float32 PyTorch; 0.01 is one in a hundred."""
    batch_size: int = 1
    """Images in a run."""
    threads: int | None = None
    """Threads to compute with. Without it, all cores and half of them are tried."""
    images: Path | None = None
    """Folder of images to compare answers on. Without it, those for calibration, or built-in photographs."""
    calibration: Path | None = None
    """int8: a folder of images like those the model will see."""
    data: str | None = None
    """Labeled images, as for training: max_loss is then a loss of accuracy."""
    rounds: int = 10
    """Turns of each engine."""
    out: Path | None = None
    """Folder for the result. Without it, that of the checkpoint, where engine auto looks."""


def check_settings(config: BenchmarkConfig | TuneConfig) -> None:
    """Raise a `MobileViTError` for settings that suit no model."""
    for name, value in vars(config).items():
        if value == () and name != "threads":
            raise MobileViTError(f"`{name}` is empty; give one or more")
        if name in ("batch_size", "batch_sizes", "threads", "rounds", "max_workers") and value is not None:
            least = 2 if name == "max_workers" else 1  # the baseline has a process, too
            for count in value if isinstance(value, tuple) else (value,):
                if count < least:
                    raise MobileViTError(f"`{name}` is {count}; give {least} or more")
        if name in ("calibration", "images") and value is not None and not value.is_dir():
            raise MobileViTError(f"`{name}`: {value} is no folder of images")
    if isinstance(config, TuneConfig):
        if not 0 <= config.max_loss < 1:
            raise MobileViTError(f"`max_loss` is {config.max_loss}; give a share from 0 to 1, such as 0.01")
        if "compile" in config.engines:
            raise MobileViTError("torch.compile compiles in every process, so it is not tuned; choose it by `engine`")
    for precision in config.precisions:
        if precision not in PRECISIONS:
            raise MobileViTError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
