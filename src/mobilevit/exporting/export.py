"""From a checkpoint to a file for a device: convert, compare with the model, and only then put it in its place."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import statistics
import tempfile
import timeit
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mobilevit import __version__, factory
from mobilevit.card import card_of
from mobilevit.data.imageset import AnyImages
from mobilevit.errors import MissingPackageError, MobileViTError
from mobilevit.evaluation import evaluate_session, find_part
from mobilevit.exporting import openvino
from mobilevit.exporting.graph import Plan, export_graph
from mobilevit.exporting.images import Images, calibration_pixels, parity_pixels
from mobilevit.exporting.options import FORMATS, Dynamic, ExportOptions, check_options, known_format
from mobilevit.exporting.parity import Parity, check
from mobilevit.exporting.quantization import float_modules, is_below
from mobilevit.exporting.sensitivity import LayerSensitivity, choose_float, measure_sensitivity, save_plot
from mobilevit.exporting.web import find_runtime, write_page
from mobilevit.files import Json, write_json
from mobilevit.runtime.artifact import SUFFIXES, Artifact, artifact_files, write_sidecar
from mobilevit.runtime.session import ArtifactSession
from mobilevit.torch_session import TorchSession

log = logging.getLogger("mobilevit")

_WARM_UPS = 2


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The result of an export."""

    path: Path
    """The artifact, or the folder of a page."""
    artifact: Artifact
    num_bytes: int
    parity: Parity | None = None
    """None: not compared, as `verified` says why."""
    verified: str
    """"yes", or why not."""
    latency_ms: float | None = None
    """Median time of one image on this machine, with all cores."""
    torch_latency_ms: float | None = None
    """The same for the fused model in PyTorch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Accuracy of the artifact on labeled images, if these were given."""
    torch_metrics: dict[str, float] = field(default_factory=dict)
    """The same for the model in PyTorch."""
    sensitivity: tuple[LayerSensitivity, ...] = ()
    """int8, on request: the cost of quantizing each layer alone, the most sensitive first."""
    in_float: tuple[str, ...] = ()
    """int8: modules that compute in floating point, with all below them."""
    worth_keeping_float: tuple[str, ...] = ()
    """Layers in int8 to give to `keep_float` for 30 dB of signal over noise; often none."""

    def lines(self) -> list[tuple[str, str]]:
        """Summarize the report in pairs of words."""
        lines = [("format", f"{self.artifact.format}, {self.artifact.precision}")]
        if self.parity is None:
            lines.append(("NOT VERIFIED", self.verified))
        else:
            parity = self.parity
            lines.append((parity.measure, f"{parity.agreement:.2%} of {parity.images} ({parity.source})"))
            if parity.max_difference is not None:
                lines.append(("largest difference", f"{parity.max_difference:.1e}"))
        if self.latency_ms is not None:
            lines.append(("one image", f"{self.latency_ms:.1f} ms here, in PyTorch {self.torch_latency_ms:.1f} ms"))
        lines += [(name, f"{value:.4f}, before {self.torch_metrics[name]:.4f}") for name, value in self.metrics.items()]
        for row in self.sensitivity[:5]:
            is_float = ", stays in float" if is_below(row.name, self.in_float) else ""
            lines.append((f"sensitive {row.kind}", f"{row.name}, {row.sqnr_db:.1f} dB alone{is_float}"))
        if self.worth_keeping_float:
            lines.append(("worth a try", f"--keep-float {' '.join(self.worth_keeping_float)}"))
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        values = asdict(self)
        for name in ("path", "artifact", "num_bytes"):
            del values[name]
        return {
            "file": self.path.name,
            "format": self.artifact.format,
            "precision": self.artifact.precision,
            "task": self.artifact.card.task,
            "bytes": self.num_bytes,
            **values,
        }


class ExportError(MobileViTError):
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
    data: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> ExportReport:
    """Write a model as a file for a device, after comparing its answers with the model's on real images.

    Args:
        model: from `create_model` or `load`, or a checkpoint file.
        out: folder for the file, its sidecar and `report.json`, which has an entry for each file of the folder.
        format: "onnx", "openvino", "executorch", "litert", "coreml", "pt2"; or "web", a page that runs the model.
        precision: "fp32"; "fp16", "bf16", "int8" or "palettized" where the format has it.
        calibration: for int8: a folder of images like those that the model will see, or at least 32 images.
        keep_float: int8: layers to leave in floating point, as `sensitivity` names them, with all below them.
        sensitivity: int8: measure the cost of quantizing each layer alone; see the report and `sensitivity.png`.
        image_size: (height, width) of the input; None: the model's own.
        batch_size: images in a run.
        dynamic: "batch", "size" (multiples of 32) or both may change from run to run. ONNX, OpenVINO and pt2.
        bake_preprocessing: take uint8 (B, H, W, 3) as images are; scaling happens inside.
        label_map: segmentation: give the class of every pixel instead of logits.
        nms: detection to ONNX: suppress overlapping boxes inside, too.
        images: folder or images to compare on; None: those of `calibration`, or else built-in photographs.
        verify: compare with the model before the artifact is put into place.
        data: labeled images, as for training, to measure accuracy on, before and after.
        name: of the file, without suffix; None: the checkpoint's.

    Raises:
        ExportError: the artifact gives other answers than the model; only `report.json` is left behind.
        MobileViTError: the options do not suit the format, its packages are not installed, or images cannot be used.
    """
    options = ExportOptions(
        calibration=calibration,
        keep_float=tuple(keep_float),
        sensitivity=sensitivity,
        image_size=image_size,
        batch_size=batch_size,
        dynamic=tuple(dynamic),
        bake_preprocessing=bake_preprocessing,
        label_map=label_map,
        nms=nms,
        images=images or calibration,
        verify=verify,
        data=data,
    )
    loaded = model if isinstance(model, nn.Module) else factory.load(model)
    stem = name or (card_of(loaded).name if isinstance(model, nn.Module) else Path(model).stem)
    if format == "web":
        return _export_page(loaded, Path(out), stem, precision, options)
    return _export_file(loaded, Path(out), stem, format, precision, options)


def _export_page(model: nn.Module, out: Path, stem: str, precision: str, options: ExportOptions) -> ExportReport:
    """Export to ONNX, and write a folder with a page around the file."""
    if options.batch_size != 1 or options.dynamic or options.label_map or options.sensitivity:
        raise MobileViTError(
            "a page takes one image at a time, at one size; leave `batch_size`, `dynamic`, `label_map` and "
            "`sensitivity` out"
        )
    runtime = find_runtime()
    options = replace(options, bake_preprocessing=True, nms=card_of(model).task == "detection")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as aside:
        try:
            report = _export_file(model, Path(aside), "model", "onnx", precision, options)
        except ExportError:
            shutil.copy(Path(aside) / "report.json", out)
            raise
        final = out / f"{_file_name(stem, precision)}-web"
        num_bytes = write_page(report.path, final, runtime)
    return replace(report, path=final, num_bytes=num_bytes)


def _export_file(
    model: nn.Module, folder: Path, stem: str, format_: str, precision: str, options: ExportOptions
) -> ExportReport:
    """Write the artifact into a folder aside, compare it, and move it into place if it is good."""
    plan = _make_plan(model, format_, precision, options)
    labeled = None
    if options.data is not None:
        labeled, which = find_part(options.data, "auto", plan.artifact.card)
        log.info("accuracy is measured on %s: %s, %d images", options.data, which, len(labeled))
    suffix = next(suffix for suffix, its_format in SUFFIXES.items() if its_format == format_)
    final = folder / f"{_file_name(stem, precision)}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
        path = Path(aside) / final.name
        _convert(plan, path)
        write_sidecar(path, plan.artifact)
        report = replace(_verify(plan, path, model, options, labeled), path=final)
        if options.sensitivity:
            rows = measure_sensitivity(plan.graph, plan.calibration)
            save_plot(rows, folder / "sensitivity.png")
            in_int8 = [row for row in rows if not is_below(row.name, plan.in_float)]
            report = replace(report, sensitivity=tuple(rows), worth_keeping_float=choose_float(in_int8))
        _add_to(folder / "report.json", report)
        if report.parity is not None and not report.parity.good:
            raise ExportError(
                f"{final.name}: not written; {report.parity.reason} ({report.parity.source}). See report.json in the "
                "output folder for details; turn `verify` off to write it all the same"
            )
        for part in sorted(Path(aside).iterdir()):
            if (folder / part.name).is_dir():
                shutil.rmtree(folder / part.name)
            part.replace(folder / part.name)
    if report.verified != "yes":
        log.warning("NOT VERIFIED: %s. %s", final, report.verified)
    return report


def _file_name(stem: str, precision: str) -> str:
    return stem if precision == "fp32" else f"{stem}-{precision}"


def _make_plan(model: nn.Module, format_: str, precision: str, options: ExportOptions) -> Plan:
    """Build the graph, describe the artifact and read the calibration images."""
    known = known_format(format_, precision)
    card = card_of(model)
    size = options.image_size or card.preprocessing.size
    any_size, any_batch = "size" in options.dynamic, "batch" in options.dynamic
    image_size = None if any_size else size
    graph = export_graph(model, image_size=image_size, baked=options.bake_preprocessing, label_map=options.label_map)
    check_options(options, *known, card, graph)
    provenance = card.provenance | {
        "exported_by": f"mobilevit {__version__}, torch {torch.__version__}",
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    preprocessing = replace(card.preprocessing, size=size)
    artifact = Artifact(
        format=known[0],
        precision=known[1],
        card=replace(card, preprocessing=preprocessing, provenance=provenance),
        batch_size=None if any_batch else options.batch_size,
        image_size=image_size,
        baked=options.bake_preprocessing,
        outputs=(*graph.output_names, "selected") if options.nms else graph.output_names,
        settings=openvino.settings(known[1]) if format_ == "openvino" else {},
    )
    # PyTorch takes a traced size of 1 for a constant: of a batch, and of a map that is a single patch.
    traced_batch = 2 if any_batch else options.batch_size
    steps = [2 * step if any_size else 0 for step in graph.size_multiple]
    traced_size = (max(size[0], steps[0]), max(size[1], steps[1]))
    calibration = []
    if precision == "int8" and options.calibration is not None:
        for image in calibration_pixels(options.calibration, preprocessing):
            scaled = image[None] if graph.baked else preprocessing.normalize(image[None])
            calibration.append(torch.from_numpy(scaled).contiguous())
    return Plan(
        graph=graph,
        artifact=artifact,
        example=graph.example(traced_batch, traced_size),
        calibration=calibration,
        in_float=float_modules(graph, options.keep_float) if precision == "int8" else (),
    )


def _convert(plan: Plan, path: Path) -> None:
    """Write the file; converters' messages about their own progress are dropped."""
    traits = FORMATS[plan.artifact.format]
    log.info("converting to %s, %s", plan.artifact.format, plan.artifact.precision)
    try:
        with _quiet():
            traits.convert(plan, path)
    except ImportError as error:
        package = (error.name or "mobilevit").partition(".")[0]
        if package == "mobilevit":
            raise
        remedy = traits.remedy or f"pip install 'mobilevit[{plan.artifact.format}]'"
        raise MissingPackageError(f"{package} is not installed; {remedy}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what is written to the screen, and remove log handlers that a converter installs."""
    level, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        logging.root.handlers[:] = handlers


def _verify(
    plan: Plan, path: Path, model: nn.Module, options: ExportOptions, labeled: AnyImages | None
) -> ExportReport:
    """Compare the artifact with the model, and measure time and accuracy of both."""
    artifact = plan.artifact
    report = ExportReport(
        path=path,
        artifact=artifact,
        num_bytes=sum(part.stat().st_size for part in artifact_files(path)),
        verified="verification was turned off: its answers have not been compared with the model's",
        in_float=plan.in_float,
    )
    if not options.verify:
        return report
    if not FORMATS[artifact.format].runs_here:
        why = f"{artifact.format} does not run on this system, so its answers have not been compared with the model's"
        return replace(report, verified=f"{why}; export on a Mac to compare them")
    pixels, source = parity_pixels(options.images, artifact.card.preprocessing)
    session = ArtifactSession(path, trust_pt2=True)  # it was written just now
    parity = check(plan.graph, session, pixels, source)
    theirs = TorchSession(model, artifact.card, device=torch.device("cpu"))
    one = pixels[: artifact.batch_size or 1]
    times_ms = [
        [timeit.timeit(partial(side.run, one), number=1) * 1e3 for side in (session, theirs)]  # in turns
        for _ in range(_WARM_UPS + 15)
    ]
    latency, torch_latency = (statistics.median(side) for side in zip(*times_ms[_WARM_UPS:], strict=True))
    if labeled is not None:
        before = evaluate_session(theirs, labeled, label="evaluate PyTorch").report.summary
        after = evaluate_session(session, labeled, label=f"evaluate {artifact.format}").report.summary
        report = replace(report, torch_metrics=before, metrics=after)
    return replace(
        report,
        parity=parity,
        verified="yes" if parity.good else parity.reason,
        latency_ms=round(latency / len(one), 3),
        torch_latency_ms=round(torch_latency / len(one), 3),
    )


def _add_to(path: Path, report: ExportReport) -> None:
    """Add an entry to a report, beside those of other artifacts of the folder; a damaged one is written anew."""
    entries: Json = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        entries = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**entries, report.path.name: report.to_dict()})
