"""From a checkpoint to a file for a device: convert, compare with the model, and only then put it in its place."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mobilevit import __version__, factory
from mobilevit.card import ModelCard, card_of
from mobilevit.errors import MobileViTError
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.images import Images, calibration_pixels, parity_pixels
from mobilevit.exporting.parity import Parity, check
from mobilevit.exporting.plan import Plan
from mobilevit.exporting.quantization import float_modules, is_below
from mobilevit.exporting.sensitivity import LayerSensitivity, choose_float, save_plot
from mobilevit.exporting.sensitivity import sensitivity as measure_sensitivity
from mobilevit.files import write_json
from mobilevit.models.inputs import normalize
from mobilevit.runtime.artifact import SUFFIXES, Artifact, Format, Precision, write_sidecar
from mobilevit.runtime.session import ArtifactSession, Session
from mobilevit.torch_session import TorchSession

log = logging.getLogger("mobilevit")

Dynamic = Literal["batch", "size"]
Evaluate = Callable[[Session, ModelCard, str], Mapping[str, float]]
"""Measures a model on labeled images, resized as its card says; the text is for the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What there is to know of a format."""

    precisions: tuple[Precision, ...]
    dynamic: bool
    """Whether batch and size can be left open."""
    runs_here: Callable[[], bool] = lambda: True
    """Whether its runtime exists for this system."""


def _on_a_mac() -> bool:
    return os.uname().sysname == "Darwin" if hasattr(os, "uname") else False


FORMATS: dict[Format, Kind] = {
    "onnx": Kind(precisions=("fp32", "fp16", "int8"), dynamic=True),
    "openvino": Kind(precisions=("fp32", "fp16", "bf16", "int8"), dynamic=True),
    "executorch": Kind(precisions=("fp32", "int8"), dynamic=False),
    "litert": Kind(precisions=("fp32", "fp16", "int8"), dynamic=False),
    "coreml": Kind(precisions=("fp32", "fp16", "palettized"), dynamic=False, runs_here=_on_a_mac),
    "pt2": Kind(precisions=("fp32", "bf16"), dynamic=True),
}
"""In `mobilevit.exporting`, the module of each format has the function `convert`."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What came of an export."""

    path: Path
    """The artifact."""
    artifact: Artifact
    num_bytes: int
    parity: Parity | None
    """None: not compared, as `verified` says why."""
    verified: str
    """"yes", or why not."""
    latency_ms: float | None
    """Median of single images on this machine, all cores."""
    torch_latency_ms: float | None
    """The same of the fused model in PyTorch."""
    metrics: dict[str, float]
    """Of the artifact on labeled images, if these were given."""
    torch_metrics: dict[str, float]
    """Of the model it was made of."""
    sensitivity: tuple[LayerSensitivity, ...] = ()
    """int8, on request: what quantizing each layer alone costs, the most sensitive first."""
    in_float: tuple[str, ...] = ()
    """int8: modules that compute in floating point, with all below them."""
    worth_keeping_float: tuple[str, ...] = ()
    """Of those that are in int8, the layers to give to `keep_float` for 30 dB of signal over noise; often none."""

    def lines(self) -> list[tuple[str, str]]:
        """What people want to know, as pairs of words."""
        lines = [("format", f"{self.artifact.format}, {self.artifact.precision}")]
        if self.parity is not None:
            parity = self.parity
            lines.append((parity.measure, f"{parity.agreement:.2%} of {parity.images} ({parity.source})"))
            if parity.max_difference is not None:
                lines.append(("largest difference", f"{parity.max_difference:.1e}"))
        else:
            lines.append(("NOT VERIFIED", self.verified))
        if self.latency_ms is not None:
            lines.append(("one image", f"{self.latency_ms:.1f} ms here, in PyTorch {self.torch_latency_ms:.1f} ms"))
        lines += [(name, f"{value:.4f}, before {self.torch_metrics[name]:.4f}") for name, value in self.metrics.items()]
        for row in self.sensitivity[:5]:
            is_float = ", stays in float" if is_below(row.name, self.in_float) else ""
            lines.append((f"sensitive {row.kind}", f"{row.name}, {row.sqnr_db:.1f} dB alone{is_float}"))
        if self.worth_keeping_float:
            lines.append(("worth a try", f"--keep-float {' '.join(self.worth_keeping_float)}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "file": self.path.name,
            "format": self.artifact.format,
            "precision": self.artifact.precision,
            "task": self.artifact.card.task,
            "bytes": self.num_bytes,
            "verified": self.verified,
            "parity": self.parity.to_dict() if self.parity else None,
            "latency_ms": self.latency_ms,
            "torch_latency_ms": self.torch_latency_ms,
            "metrics": self.metrics,
            "torch_metrics": self.torch_metrics,
            "sensitivity": [row.to_dict() for row in self.sensitivity],
            "in_float": list(self.in_float),
            "worth_keeping_float": list(self.worth_keeping_float),
        }


class ExportError(ValueError):
    """An artifact that does not give the answers of its model; it was not put into place."""


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",  # noqa: A002, the field's word
    precision: str = "fp32",
    calibration: Images | None = None,
    keep_float: Sequence[str] = (),
    sensitivity: bool = False,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    dynamic: Sequence[Dynamic] = (),
    bake_preprocessing: bool = False,
    label_map: bool = False,
    nms: bool = False,
    images: Images | None = None,
    verify: bool = True,
    evaluate: Evaluate | None = None,
    name: str | None = None,
) -> ExportReport:
    """Write a model as a file for a device, after comparing its answers with the model's on real images.

    Beside the artifact stand its sidecar (classes, preprocessing, threshold, provenance) and `report.json`, with an
    entry for each artifact of the folder.

    Args:
        model: from `create_model` or `load`, or a checkpoint file.
        out: folder to write to.
        format: "onnx", "openvino", "executorch", "litert", "coreml" or "pt2"; or "web", a folder with a page that runs
            the model in the browser.
        precision: "fp32"; "fp16", "bf16", "int8" or "palettized" where the format has it.
        calibration: for int8: a folder of images of what the model will see, or 32 images and more.
        keep_float: int8: layers to leave in floating point, as `sensitivity` names them, with all below them.
        sensitivity: int8: measure what quantizing each layer alone costs; into the report and `sensitivity.png`.
        image_size: (height, width) of the input; what the model was made for, if not given.
        batch_size: images in a run.
        dynamic: what may change from run to run: "batch", "size" (multiples of 32), or both. ONNX, OpenVINO and pt2.
        bake_preprocessing: take uint8 (B, H, W, 3) as images are; scaling happens inside.
        label_map: segmentation: give the class of every pixel instead of logits.
        nms: detection to ONNX: suppress overlapping boxes inside, too.
        images: folder or images to compare on; built-in photographs if not given, for int8 those of `calibration`.
        verify: compare with the model before the artifact is put into place.
        evaluate: measures accuracy on labeled images, before and after.
        name: of the file, without suffix; the checkpoint's, if not given.

    Raises:
        ExportError: the artifact gives other answers than the model; nothing but `report.json` is left behind.
        ValueError: the format lacks what was asked, its packages are not installed, or images cannot be used.
    """
    loaded = model if isinstance(model, nn.Module) else factory.load(model)
    card = card_of(loaded)
    stem = name or (card.name if isinstance(model, nn.Module) else Path(model).stem)
    if format == "web":
        from mobilevit.exporting.web import export_web

        if batch_size != 1 or dynamic or label_map or sensitivity:
            raise MobileViTError(
                "a page takes one image at a time, at one size; leave --batch-size, --dynamic, --label-map and "
                "--sensitivity out"
            )
        return export_web(
            loaded,
            card,
            Path(out),
            name=stem,
            precision=precision,
            calibration=calibration,
            keep_float=keep_float,
            image_size=image_size,
            images=images,
            verify=verify,
            evaluate=evaluate,
        )
    kind, format_, precision_ = _known(format, precision)
    _check_wishes(
        card, format_, kind, dynamic, calibration, precision_, sensitivity=sensitivity, label_map=label_map, nms=nms
    )
    size = image_size or card.preprocessing.size
    graph = ExportGraph(
        loaded, image_size=None if "size" in dynamic else size, baked=bake_preprocessing, label_map=label_map
    ).eval()
    _check_size(size, graph.size_multiple)
    card = dataclasses.replace(
        card,
        preprocessing=dataclasses.replace(card.preprocessing, size=size),
        provenance={
            **card.provenance,
            "exported_by": f"mobilevit {__version__}, torch {torch.__version__}",
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    convert = importlib.import_module(f"mobilevit.exporting.{format_}").convert
    calibrating: Tensor | list[Tensor] = []
    if precision_ == "int8" and calibration is not None:
        calibrating = calibration_pixels(calibration, card.preprocessing)
    artifact = Artifact(
        format=format_,
        precision=precision_,
        card=card,
        batch_size=None if "batch" in dynamic else batch_size,
        image_size=None if "size" in dynamic else size,
        baked=bake_preprocessing,
        outputs=(*graph.output_names, "selected") if nms else graph.output_names,
        settings=_SETTINGS.get((format_, precision_), {}),
    )
    traced = size
    if "size" in dynamic:  # a map of a single patch would be taken for a constant
        height, width = (max(side, 2 * step) for side, step in zip(size, graph.size_multiple, strict=True))
        traced = (height, width)
    plan = Plan(
        graph=graph,
        artifact=artifact,
        # PyTorch takes a traced size of 1 for a constant.
        example=graph.example(2 if "batch" in dynamic else batch_size, traced),
        calibration=[_as_input(graph, card, pixels[None]) for pixels in calibrating],
        keep_float=tuple(keep_float),
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = next(suffix for suffix, its_format in SUFFIXES.items() if its_format == format_)
    final = folder / f"{stem}{'' if precision_ == 'fp32' else '-' + precision_}{suffix}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
        path = Path(aside) / final.name
        log.info("converting to %s, %s", format_, precision_)
        try:
            convert(plan, path)
        except ModuleNotFoundError as error:
            raise MobileViTError(f"{error.name} is not installed; pip install 'mobilevit[{format_}]'") from None
        write_sidecar(path, artifact)
        report = _verify(plan, path, loaded, images or calibration, evaluate=evaluate, verify=verify)
        rows = measure_sensitivity(graph, plan.calibration) if sensitivity else []
        in_float = float_modules(plan) if precision_ == "int8" else ()
        in_int8 = [row for row in rows if not is_below(row.name, in_float)]
        report = dataclasses.replace(
            report,
            path=final,
            sensitivity=tuple(rows),
            in_float=in_float,
            worth_keeping_float=choose_float(in_int8),
        )
        if rows:
            save_plot(rows, folder / "sensitivity.png")
        _add_to(folder / "report.json", report)
        if report.parity is not None and not report.parity.good:
            raise ExportError(
                f"{final}: not written; {report.parity.reason} ({report.parity.source}). Details are in "
                f"{folder / 'report.json'}; verify=False (--no-verify) writes it all the same"
            )
        for part in sorted(Path(aside).iterdir()):
            _move(part, folder / part.name)
    if report.verified != "yes":
        log.warning("NOT VERIFIED: %s. %s", final, report.verified)
    return report


_SETTINGS: dict[tuple[Format, Precision], dict[str, str]] = {
    # OpenVINO computes in bfloat16 by itself where the processor can, whatever the file holds.
    ("openvino", "fp32"): {"INFERENCE_PRECISION_HINT": "f32"},
    ("openvino", "fp16"): {"INFERENCE_PRECISION_HINT": "f32"},
    ("openvino", "bf16"): {"INFERENCE_PRECISION_HINT": "bf16"},
    # What stays in floating point there: XXS takes 8.8 ms instead of 9.5 of bf16 alone and 13 in float32.
    ("openvino", "int8"): {"INFERENCE_PRECISION_HINT": "bf16"},
}


def _known(format: str, precision: str) -> tuple[Kind, Format, Precision]:  # noqa: A002
    if format not in FORMATS:
        raise MobileViTError(f"format is {format!r}; it can be {', '.join(FORMATS)} or web")
    kind = FORMATS[format]
    if precision not in kind.precisions:
        others = [name for name, other in FORMATS.items() if precision in other.precisions]
        hint = f"; {precision} exists for {', '.join(others)}" if others else ""
        raise MobileViTError(f"{format} has no precision {precision!r}: choose {', '.join(kind.precisions)}{hint}")
    return kind, format, precision


def _check_wishes(
    card: ModelCard,
    format: Format,  # noqa: A002
    kind: Kind,
    dynamic: Sequence[str],
    calibration: Images | None,
    precision: Precision,
    *,
    sensitivity: bool,
    label_map: bool,
    nms: bool,
) -> None:
    if not card.classes:
        raise MobileViTError(
            "this checkpoint names no classes, so its answers would mean nothing; save it with classes"
        )
    for wish in dynamic:
        if wish not in get_args(Dynamic):
            raise MobileViTError(f"dynamic is {wish!r}; it can be 'batch', 'size' or both")
    if dynamic and not kind.dynamic:
        raise MobileViTError(
            f"{format} files have one batch and one size; leave --dynamic out, or choose onnx or openvino"
        )
    if "size" in dynamic and card.task == "detection":
        raise MobileViTError(
            "a detector's anchors belong to one input size; leave --dynamic size out and set --image-size"
        )
    if precision == "int8" and calibration is None:
        raise MobileViTError(
            "int8 must be calibrated on images of what the model will see; give --calibration with a folder of them"
        )
    if sensitivity and precision != "int8":
        raise MobileViTError(
            "--sensitivity says what int8 costs each layer; give --precision int8 and --calibration, too"
        )
    if label_map and card.task != "segmentation":
        raise MobileViTError(f"--label-map is for segmentation; this checkpoint does {card.task}")
    if nms and (card.task != "detection" or format != "onnx"):
        raise MobileViTError(
            "--nms is for detection in onnx; elsewhere the predictor suppresses overlapping boxes itself"
        )


def _check_size(size: tuple[int, int], multiple: tuple[int, int]) -> None:
    if any(side % step for side, step in zip(size, multiple, strict=True)):
        near = [max(step, round(side / step) * step) for side, step in zip(size, multiple, strict=True)]
        raise MobileViTError(
            f"input size {size[0]} x {size[1]}: its patches do not divide the maps of this model, which exports need "
            f"(no resizing inside); sides are multiples of {multiple[0]} and {multiple[1]}, the nearest are "
            f"--image-size {near[0]} {near[1]}"
        )


def _as_input(graph: ExportGraph, card: ModelCard, pixels: Tensor) -> Tensor:
    return (
        pixels.permute(0, 2, 3, 1).contiguous() if graph.baked else normalize(pixels, card.preprocessing).contiguous()
    )


def _verify(
    plan: Plan, path: Path, model: nn.Module, images: Images | None, *, evaluate: Evaluate | None, verify: bool
) -> ExportReport:
    artifact = plan.artifact
    report = ExportReport(
        path=path,
        artifact=artifact,
        num_bytes=sum(p.stat().st_size for p in _parts(path)),
        parity=None,
        verified="--no-verify was given: nobody has compared its answers with the model's",
        latency_ms=None,
        torch_latency_ms=None,
        metrics={},
        torch_metrics={},
    )
    if not verify:
        return report
    if not FORMATS[artifact.format].runs_here():
        return dataclasses.replace(
            report,
            verified=f"{artifact.format} does not run on this system, so nobody has compared its answers with the "
            "model's; export on a Mac to have that done",
        )
    pixels, source = parity_pixels(images, artifact.card.preprocessing)
    session = ArtifactSession(path)
    parity = check(plan.graph, session, pixels, source)
    theirs = TorchSession(model, artifact.card, device=torch.device("cpu"))
    one = pixels[: artifact.batch_size or 1].permute(0, 2, 3, 1).numpy()
    latency, torch_latency = _latencies_ms([lambda: session.run(one), lambda: theirs.run(one)])
    metrics: dict[str, float] = {}
    torch_metrics: dict[str, float] = {}
    if evaluate is not None:
        torch_metrics = dict(evaluate(theirs, artifact.card, "PyTorch"))
        metrics = dict(evaluate(session, artifact.card, artifact.format))
    return dataclasses.replace(
        report,
        parity=parity,
        verified="yes" if parity.good else parity.reason,
        latency_ms=round(latency / len(one), 3),
        torch_latency_ms=round(torch_latency / len(one), 3),
        metrics=metrics,
        torch_metrics=torch_metrics,
    )


def _latencies_ms(sides: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Median time of each, in turns."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 2):
        for side, kept in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if number >= 2:
                kept.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(kept) for kept in times]


def _parts(path: Path) -> list[Path]:
    """Files of an artifact, without its sidecar."""
    if path.is_dir():
        return [p for p in path.rglob("*") if p.is_file()]
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def _add_to(path: Path, report: ExportReport) -> None:
    """Keep the entries of other artifacts in the folder."""
    entries: dict[str, Any] = {}
    if path.is_file():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            log.warning("%s: damaged; it is written anew", path)
    write_json(path, {**entries, report.path.name: report.to_dict()})


def _move(part: Path, final: Path) -> None:
    if final.is_dir():
        shutil.rmtree(final)
    part.replace(final)
