"""The formats of exported files, and the options of an export."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.exporting import coreml, executorch, litert, onnx, openvino, pt2
from mobilevit.exporting.graph import ExportGraph, Plan
from mobilevit.exporting.images import Images
from mobilevit.models.pspnet import PSPNet
from mobilevit.runtime.artifact import Format, Precision

Dynamic = Literal["batch", "size"]


@dataclass(frozen=True, kw_only=True)
class FormatTraits:
    """One format: how its files are written, and what they can do."""

    convert: Callable[[Plan, Path], None]
    """Writes the file of a plan."""
    precisions: tuple[Precision, ...]
    dynamic: bool = False
    """Whether batch and size can be left open."""
    runs_here: bool = True
    """Whether this system runs such files."""
    remedy: str = ""
    """How to install the converter, if not by the extra of the format's name."""


FORMATS: dict[Format, FormatTraits] = {
    "onnx": FormatTraits(convert=onnx.convert, precisions=("fp32", "fp16", "int8"), dynamic=True),
    "openvino": FormatTraits(convert=openvino.convert, precisions=("fp32", "fp16", "bf16", "int8"), dynamic=True),
    "executorch": FormatTraits(convert=executorch.convert, precisions=("fp32", "int8")),
    "litert": FormatTraits(
        convert=litert.convert,
        precisions=("fp32", "fp16", "int8"),
        remedy="it needs another PyTorch, so run scripts/litert_environment.sh once, then .venv-litert/bin/mobilevit "
        "export CHECKPOINT --format litert",
    ),
    "coreml": FormatTraits(
        convert=coreml.convert,
        precisions=("fp32", "fp16", "palettized"),
        runs_here=platform.system() == "Darwin",
    ),
    "pt2": FormatTraits(convert=pt2.convert, precisions=("fp32", "bf16"), dynamic=True),
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of one file, as `export` documents them."""

    calibration: Images | None
    keep_float: tuple[str, ...]
    sensitivity: bool
    image_size: tuple[int, int] | None
    batch_size: int
    dynamic: tuple[Dynamic, ...]
    bake_preprocessing: bool
    label_map: bool
    nms: bool
    images: Images | None
    verify: bool
    data: str | os.PathLike[str] | None


def known_format(format_: str, precision: str) -> tuple[Format, Precision]:
    """Return both, typed.

    Raises:
        MobileViTError: there is no such format, or the format lacks this precision.
    """
    if format_ not in FORMATS:
        raise MobileViTError(f"`format` is {format_!r}; it can be {', '.join(FORMATS)} or web")
    precisions = FORMATS[format_].precisions
    if precision not in precisions:
        others = [name for name, traits in FORMATS.items() if precision in traits.precisions]
        hint = f"; {precision} exists for {', '.join(others)}" if others else ""
        raise MobileViTError(f"{format_} has no precision {precision!r}: choose {', '.join(precisions)}{hint}")
    return format_, precision


def check_options(
    options: ExportOptions, format_: Format, precision: Precision, card: ModelCard, graph: ExportGraph
) -> None:
    """Raise a `MobileViTError` for options that do not suit each other or the model."""
    size, steps = options.image_size or card.preprocessing.size, graph.size_multiple
    near = [max(step, round(side / step) * step) for side, step in zip(size, steps, strict=True)]
    is_detector = card.task == "detection"
    unknown = [wish for wish in options.dynamic if wish not in get_args(Dynamic)]
    mistakes = (
        (not card.classes, "this checkpoint names no classes, so its answers would mean nothing; save it with classes"),
        (unknown, f"`dynamic` is {', '.join(map(repr, unknown))}; it can be 'batch', 'size' or both"),
        (
            options.dynamic and not FORMATS[format_].dynamic,
            f"{format_} files have one batch and one size; leave `dynamic` out, or choose onnx, openvino or pt2",
        ),
        (
            "size" in options.dynamic and is_detector,
            "a detector's anchors belong to one input size; leave `dynamic` size out and set `image_size`",
        ),
        (
            "size" in options.dynamic and isinstance(graph.model, PSPNet),
            "PSPNet's pools belong to one input size; leave `dynamic` size out and set `image_size`",
        ),
        (
            precision == "int8" and options.calibration is None,
            "int8 must be calibrated on images like those that the model will see; give `calibration` a folder of them",
        ),
        (
            options.sensitivity and precision != "int8",
            "`sensitivity` measures what int8 costs each layer; set `precision` int8 and `calibration`, too",
        ),
        (
            options.label_map and card.task != "segmentation",
            f"`label_map` is for segmentation; this checkpoint does {card.task}",
        ),
        (
            options.nms and not (is_detector and format_ == "onnx"),
            "`nms` is for detection in onnx; elsewhere the predictor suppresses overlapping boxes itself",
        ),
        (
            any(side % step for side, step in zip(size, steps, strict=True)),
            f"input size {size[0]} x {size[1]}: its patches do not divide the maps of this model, which exports need "
            f"(no resizing inside); sides are multiples of {steps[0]} and {steps[1]}, the nearest are "
            f"`image_size` {near[0]} {near[1]}",
        ),
    )
    for is_wrong, message in mistakes:
        if is_wrong:
            raise MobileViTError(message)
