"""The command line: `mobilevit COMMAND`. A command is a dataclass of its options; nothing heavy is imported early."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json as jsonlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro
from tyro.conf import Positional, arg

from mobilevit.serving.settings import ServeConfig
from mobilevit.training.config import TrainConfig
from mobilevit.training.recipes import describe_recipes, find_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from mobilevit.data.imageset import ImageSet
    from mobilevit.exporting.export import Evaluate, ExportReport
    from mobilevit.inference.predictor import Result
    from mobilevit.inference.session import Session
    from mobilevit.models.card import ModelCard, Task
    from mobilevit.models.summary import Summary
    from mobilevit.preprocessing import Source
    from mobilevit.tasks.report import Report
    from mobilevit.training.evaluate import Evaluation

log = logging.getLogger("mobilevit")


class Command(Protocol):
    """What every command has besides its options."""

    def run(self) -> int:
        """Do it; return the exit status."""
        ...


# -- train ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model to classify, detect or segment; the run folder gets checkpoints, curves, metrics, a model card."""

    settings: Annotated[TrainConfig, arg(name="")]
    config: Path | None = None
    """Take settings from a run's config.json; flags change single ones."""
    recipe: str | None = None
    """Take settings from a named recipe, such as small_detection; flags change single ones. "list" shows all."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Replace another run in --out."""
    dry_run: bool = False
    """Write nothing: take a few steps, then say what the run would be: all settings, steps, memory and time."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Train, then say what came of it."""
        from mobilevit.training.distributed import speaks
        from mobilevit.training.loop import train

        if self.dry_run:
            from mobilevit.training.dry_run import dry_run

            plan = dry_run(self.settings)
            if speaks():
                print(jsonlib.dumps(plan.to_dict(), indent=2, default=str) if self.json else "\n".join(plan.lines()))
            return 0
        result = train(self.settings, resume=self.resume, overwrite=self.overwrite)
        if not speaks():
            return 0
        if self.json:
            _print_json({"best": str(result.best), "epochs": result.epochs, **result.report.to_dict()})
            return 0
        _print_report(result.report)
        print(f"\n{result.best}  (pictures of the run beside it, in {result.best.parent})")
        return 0


# -- eval -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a checkpoint on labelled pictures: accuracy, AP or mean IoU, per class, with plots and mistakes."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    data: str
    """Labelled pictures, as for training."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """auto: the val part if there is one; of the data it was trained on, what was held out; of other data, all."""
    out: Path | None = None
    """Folder for plots and pictures; beside the checkpoint if not given."""
    batch_size: int = 32
    """Pictures that go through the model together."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """To compute with on the CPU; all cores if not given."""
    engine: Literal["torch", "compile", "auto"] = "torch"
    """What runs a checkpoint; auto: what `mobilevit tune` found."""
    num_workers: int | None = None
    """Processes that read pictures."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        """Evaluate, print, write pictures."""
        from mobilevit.inference.session import open_session
        from mobilevit.training.evaluate import report_problems, report_unreadable, write_evaluation

        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; it must be 1 or more")
        card, session = open_session(self.checkpoint, device=self.device, threads=self.threads, engine=self.engine)
        data, which = _data_to_evaluate(self.data, self.split, card)
        data = data.relabel(card.classes)
        log.info("%s on %s: %s, %d pictures", self.checkpoint, self.data, which, len(data))
        report_problems(data)
        evaluation = _evaluate(session, data, card, self.batch_size, self.num_workers)
        out = self.out or self.checkpoint.parent / "evaluation"
        write_evaluation(evaluation, data, out)
        report_unreadable(evaluation.errors, "labelled", len(data))
        if self.json:
            _print_json({"checkpoint": str(self.checkpoint), "split": which, **evaluation.report.to_dict()})
        else:
            _print_report(evaluation.report)
            print(f"\nplots, samples and worst mistakes: {out}")
        return 0


def _evaluate(
    session: Session,
    data: ImageSet[Any],
    card: ModelCard,
    batch_size: int,
    num_workers: int | None = None,
    label: str = "evaluate",
) -> Evaluation:
    import torch

    from mobilevit.training.evaluate import default_num_workers, evaluate, evaluation_loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # only decides how pictures are read
    workers = default_num_workers(device) if num_workers is None else num_workers
    loader = evaluation_loader(data, card.preprocessing, batch_size=batch_size, num_workers=workers, device=device)
    return evaluate(session, loader, card.preprocessing, label=label)


def _data_to_evaluate(path: str, split: str, card: ModelCard) -> tuple[ImageSet[Any], str]:
    """The pictures to measure on, and in words which they are."""
    from mobilevit.data.datasets import find_splits
    from mobilevit.data.imageset import split as divide

    sets = find_splits(path, card.task)
    everything = sets.get("all")
    if everything is None:
        kind = split
        if split == "auto":
            kind = next(name for name in ("val", "test", "train") if name in sets)
        if kind not in sets:
            raise ValueError(f"{path}: is divided into {' and '.join(sets)}; choose --split {' or '.join(sets)}")
        return sets[kind], f"the {kind} part"
    if split == "test":
        raise ValueError(f"{path}: has no test part; leave --split out, or choose --split all")
    if split == "all":
        return everything, "all of it"
    told = card.provenance
    if "data_fingerprint" in told:
        with contextlib.suppress(ValueError):  # data that cannot be divided are not what it was trained on
            train, val = divide(everything, val_fraction=float(told["val_fraction"]), seed=int(told["seed"]))
            if train.fingerprint() == told["data_fingerprint"]:
                if split == "train":
                    return train, "what it was trained on"
                return val, "what was held out when it was trained on these"
    if split != "auto":
        raise ValueError(f"{path}: not divided, and not what this checkpoint was trained on; use --split all")
    return everything, "all of it"


# -- predict ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify, detect or segment: files, folders, globs, or - for standard input (a picture, or a path a line)."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    pictures: Positional[tuple[str, ...]]
    """Files, folders (all pictures below), globs, or -; with --out, places such as s3://bucket/folder, too."""
    save: Path | None = None
    """Write the pictures with their labels, boxes or colours into this folder."""
    top: int = 3
    """Classification: how many labels to show."""
    min_score: float | None = None
    """Detection: show objects from this score on. Without it, what balanced precision and recall in validation."""
    coco: Path | None = None
    """Detection: write all objects into this file, as COCO's results are; image_id counts the pictures from 1."""
    masks: Path | None = None
    """Segmentation: write label maps as palette PNGs into this folder."""
    batch_size: int | None = None
    """Pictures that go through the model together; without it, 16 of 256 x 256 pixels and more of smaller inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """To compute with on the CPU; all cores if not given."""
    engine: Literal["torch", "compile", "auto", "ray"] = "torch"
    """What runs a checkpoint; auto: what `mobilevit tune` found. ray, with --out: PyTorch, or an exported file's own
    runtime, in many processes of Ray Data, on this machine or a cluster."""
    json: bool = False
    """One line of JSON a picture; with --out, what was done."""
    out: Path | None = None
    """For many pictures: write rows into parquet files in this folder instead of printing. The same command goes on
    where it was stopped; a picture that cannot be read gets a row with its error."""
    overwrite: bool = False
    """With --out: replace what is there."""
    workers: int | None = None
    """With --out: batches at work at once; with ray, processes with a model each. As many as cores, if not given."""
    ray_address: str | None = None
    """With ray: the cluster, such as auto or ray://head:10001. Without it, RAY_ADDRESS, or this machine alone."""

    def run(self) -> int:
        """Predict; 2 if a picture could not be read, after the others."""
        if self.out is not None:
            return self._run_in_bulk(self.out)
        for flag, is_given in (
            ("--engine ray", self.engine == "ray"), ("--overwrite", self.overwrite),
            ("--workers", self.workers is not None), ("--ray-address", self.ray_address is not None),
        ):  # fmt: skip
            if is_given:
                raise UsageError(f"{flag} is for parquet files; name a folder for them with --out")
        from mobilevit.files import write_json
        from mobilevit.inference.predictor import Predictor
        from mobilevit.preprocessing import ImageError
        from mobilevit.progress import Progress
        from mobilevit.tasks.detection import DetectionResult
        from mobilevit.tasks.segmentation import SegmentationResult

        if not self.pictures:
            raise UsageError("no pictures; name files, folders, globs, or - for standard input")
        assert self.engine != "ray"
        predictor = Predictor(
            self.checkpoint,
            device=self.device,
            batch_size=self.batch_size,
            threads=self.threads,
            engine=self.engine,
        )
        task = predictor.card.task
        for flag, given, its_task in (
            ("--coco", self.coco, "detection"), ("--min-score", self.min_score, "detection"),
            ("--masks", self.masks, "segmentation"),
        ):  # fmt: skip
            if given is not None and task != its_task:
                raise ValueError(f"{flag} is for {its_task}; this checkpoint does {task}")
        sources, total = _sources(self.pictures)
        width = min(max((len(str(s)) for s in sources if isinstance(s, str)), default=20), 60) if total else 40
        failed, names = 0, _FreeNames()
        coco: list[dict[str, Any]] = []
        # Standard output is the progress, unless it goes into a file.
        quiet = sys.stdout.isatty() or not total
        bar = contextlib.nullcontext() if quiet else Progress("predict", total)
        with bar as progress:
            for number, result in enumerate(predictor.stream(sources), start=1):
                if progress is not None:
                    progress.advance(1)
                if isinstance(result, ImageError):
                    failed += 1
                    print(f"error: {result}", file=sys.stderr)
                    if self.json:
                        name, _, reason = str(result).partition(": ")
                        _print_json_line({"source": name, "error": reason})
                    continue
                if self.json:
                    _print_json_line(_as_dict(result, self.top, self.min_score))
                else:
                    _print_prediction(result, width, self.top, self.min_score)
                if self.coco is not None and isinstance(result, DetectionResult):
                    coco += [{**row, "file_name": result.source} for row in result.to_coco(number)]
                if self.save is None and self.masks is None:
                    continue
                stem = names.free(Path(result.source).stem)
                if self.save is not None:
                    _draw(result, self.save / f"{stem}.jpg", self.top, self.min_score)
                if self.masks is not None and isinstance(result, SegmentationResult):
                    result.save_mask(self.masks / f"{stem}.png")
        if self.coco is not None:
            write_json(self.coco, coco)
        if failed:
            log.error("error: %d of the pictures cannot be read; the others are done", failed)
        return 2 if failed else 0

    def _run_in_bulk(self, out: Path) -> int:
        """Rows into parquet files; 2 if a picture could not be read, 1 if it was stopped."""
        from mobilevit.inference.bulk import BulkJob, predict_in_bulk
        from mobilevit.inference.sources import find_sources

        for flag, given in (("--save", self.save), ("--coco", self.coco)):
            if given is not None:
                raise UsageError(f"{flag} and --out do not go together; leave one out")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("--ray-address is for --engine ray")
        if not self.pictures:
            raise UsageError("no pictures; name files, folders, globs, places such as s3://bucket/folder, or -")
        job = BulkJob(
            model=self.checkpoint,
            out=out,
            top=self.top,
            min_score=self.min_score,
            masks=self.masks,
            batch_size=self.batch_size,
            device=self.device,
            threads=self.threads,
            engine=self.engine,
            workers=self.workers,
            ray_address=self.ray_address,
            overwrite=self.overwrite,
        )
        named: Sequence[str] = self.pictures
        if list(named) == ["-"]:
            lines = (os.fsdecode(line).strip() for line in sys.stdin.buffer)
            named = [line for line in lines if line]
        report = predict_in_bulk(job, find_sources(named))
        if self.json:
            _print_json(report.to_dict())
        else:
            print(report.describe())
        return 1 if report.stopped else 2 if report.num_errors else 0


def _sources(arguments: Sequence[str]) -> tuple[Sequence[Source] | Iterator[Source], int]:
    """Pictures for what a user named, and how many (0: not known)."""
    from mobilevit.inference.sources import find_local

    if list(arguments) == ["-"]:
        return _from_standard_input(), 0
    found: list[Source] = [name for argument in arguments for name in find_local(argument)]
    return found, len(found)


def _from_standard_input() -> Iterator[Source]:
    stream = sys.stdin.buffer
    start = stream.peek(12)[:12]  # type: ignore[union-attr]
    if start.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")):
        yield stream.read()
        return
    for line in stream:
        if name := line.decode(errors="replace").strip():
            yield name


class _FreeNames:
    """Gives each saved picture a name of its own: pictures in different folders may share theirs."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, stem: str) -> str:
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return name


# -- explain ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Draw what a pixel attends to in every block, layer and head, and which parts of the picture decided."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    picture: Positional[Path]
    """The picture."""
    pixel: tuple[int, int] | None = None
    """x and y of the pixel to look from, counted from 0 at the top left. Without it, where the most decided."""
    figure: Literal["attention", "patches", "both"] = "attention"
    """attention: what the pixel attends to. patches: how this picture is unfolded into sequences, for teaching."""
    out: Path = Path("explanation.png")
    """The picture to write; with both, the second gets "-patches" behind its name."""
    json: bool = False
    """Print figures as JSON, too."""

    def run(self) -> int:
        """Explain, draw, print."""
        from mobilevit import factory
        from mobilevit.inference.artefact import is_artefact
        from mobilevit.inference.explain import explain

        if is_artefact(self.checkpoint):
            raise ValueError(f"{self.checkpoint}: explain looks inside; give it the checkpoint it was exported from")
        explanation = explain(factory.load(self.checkpoint), self.picture, pixel=self.pixel)
        patches = self.out if self.figure == "patches" else self.out.with_stem(f"{self.out.stem}-patches")
        if self.figure != "patches":
            explanation.draw(self.out)
        if self.figure != "attention":
            explanation.draw_patches(patches)
        if self.json:
            _print_json(explanation.to_dict())
            return 0
        x, y = explanation.pixel
        print(f"{explanation.label}  {explanation.score:.1%}, looked at from pixel {x} {y}")
        for block in explanation.blocks:
            (ph, pw), spread = block.patch_size, block.attended().mean(axis=1)
            told = ", ".join(f"{value:.1f}" for value in spread)
            print(f"  {block.name}, patches of {ph} x {pw}: attends to {told} of {block.num_tokens} patches, by layer")
        for path, drawn in ((self.out, self.figure != "patches"), (patches, self.figure != "attention")):
            if drawn:
                print(path)
        return 0


# -- export -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a file for a device, compared with the model on real pictures before it is called good."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    format: tuple[Literal["onnx", "openvino", "executorch", "litert", "coreml", "pt2", "web"], ...] = ("onnx",)
    """One or more: onnx (servers), openvino (Intel, ARM), executorch and litert (phones), coreml, pt2; web: a folder
    with a page that runs the model in the visitor's browser."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "palettized"] = "fp32"
    """Numbers to compute with; int8 needs --calibration."""
    out: Path | None = None
    """Folder to write to; "exported" beside the checkpoint if not given."""
    calibration: Path | None = None
    """int8: a folder of pictures of what the model will see."""
    keep_float: tuple[str, ...] = ()
    """int8: layers to leave in floating point, as --sensitivity names them, with all below them."""
    sensitivity: bool = False
    """int8: measure what quantising each layer alone costs, and draw it."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. What the checkpoint was made for, if not given."""
    batch_size: int = 1
    """Pictures in a run."""
    dynamic: tuple[Literal["batch", "size"], ...] = ()
    """What may change from run to run (onnx, openvino, pt2)."""
    bake_preprocessing: bool = False
    """Take uint8 (B, H, W, 3), as pictures are; scaling happens inside."""
    label_map: bool = False
    """Segmentation: give the class of every pixel instead of logits."""
    nms: bool = False
    """Detection to onnx: suppress overlapping boxes inside, too."""
    pictures: Path | None = None
    """Folder of pictures to compare on; built-in photographs, or those of --calibration, if not given."""
    data: str | None = None
    """Labelled pictures, as for training: report accuracy before and after."""
    verify: bool = True
    """Compare the file with the model. Without it, nobody knows whether it is right."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Export to each format; say how each compares."""
        from mobilevit import factory
        from mobilevit.exporting.export import export
        from mobilevit.models.card import card_of

        if len(self.image_size) > 2:
            raise ValueError("--image-size takes one number, or height and width")
        if not self.format:
            raise ValueError("--format names no format; choose onnx, openvino, executorch, litert, coreml, pt2 or web")
        model = factory.load(self.checkpoint)
        measure = None if self.data is None else _measure_on(self.data, card_of(model))
        reports = [
            export(
                model,
                self.out or self.checkpoint.parent / "exported",
                format=name,
                precision=self.precision,
                calibration=self.calibration,
                keep_float=self.keep_float,
                sensitivity=self.sensitivity,
                image_size=(self.image_size[0], self.image_size[-1]) if self.image_size else None,
                batch_size=self.batch_size,
                dynamic=self.dynamic,
                bake_preprocessing=self.bake_preprocessing,
                label_map=self.label_map,
                nms=self.nms,
                pictures=self.pictures,
                verify=self.verify,
                evaluate=measure,
                name=self.checkpoint.stem,
            )
            for name in self.format
        ]
        if self.json:
            _print_json({report.path.name: {"path": str(report.path), **report.to_dict()} for report in reports})
        else:
            for report in reports:
                _print_export(report)
        return 0


def _measure_on(path: str, card: ModelCard) -> Evaluate:
    """A function that measures any session of a model on labelled pictures."""
    data, which = _data_to_evaluate(path, "auto", card)
    data = data.relabel(card.classes)
    log.info("accuracy is measured on %s: %s, %d pictures", path, which, len(data))

    def measure(session: Session, card: ModelCard, label: str) -> dict[str, float]:
        return dict(_evaluate(session, data, card, 16, label=f"evaluate {label}").report.summary)

    return measure


def _print_export(report: ExportReport) -> None:
    print(f"\n{report.path}  ({report.num_bytes / 1e6:.1f} MB)")
    lines = report.lines()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"  {name:<{width}}  {value}")


# -- info -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show a model's layers (shape, parameters, multiply-adds) and what attention costs in each MobileViT block."""

    model: Positional[str]
    """A model's name or a checkpoint file."""
    task: Literal["classification", "detection", "segmentation"] = "classification"
    """Of a named model; a checkpoint has its own."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. By the task, or what the checkpoint was made for."""
    patch_size: tuple[int, int, int] | None = None
    """Patch sides at strides 8, 16 and 32, of a named model."""
    output_stride: int | None = None
    """32, 16 or 8, of a named model."""
    num_classes: int | None = None
    """Classes of a named model: 1000, in detection 80, in segmentation 21."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure and print."""
        import torch

        from mobilevit import factory
        from mobilevit.models import MODELS
        from mobilevit.models.card import card_of
        from mobilevit.models.summary import summarize
        from mobilevit.preprocessing import Preprocessing

        named = self.model in MODELS or not (Path(self.model).suffix or Path(self.model).exists())
        if named:
            with torch.device("meta"):  # shapes, no numbers
                model = factory.create_model(
                    self.model,
                    task=self.task,
                    num_classes=self.num_classes,
                    patch_size=self.patch_size,
                    output_stride=self.output_stride,
                )
        else:
            model = factory.load(self.model)
        card = card_of(model)
        size = card.preprocessing.size
        if self.image_size:
            if len(self.image_size) > 2:
                raise ValueError("--image-size takes one number, or height and width")
            size = (self.image_size[0], self.image_size[-1])
        Preprocessing(size=size)  # says what sizes there are
        summary = summarize(model, size)
        if self.json:
            told = {} if named else {"card": dataclasses.asdict(card)}
            _print_json({"model": self.model, "task": card.task, **summary.to_dict(), **told})
            return 0
        _print_summary(self.model, summary, card, named=named)
        return 0


# -- convert ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint between this package, ml-cvnets, timm and transformers."""

    source: Positional[Path]
    """A checkpoint of any of the four; which one is recognised."""
    target: Positional[Path]
    """The .safetensors to write."""
    to: Literal["mobilevit", "cvnets", "timm", "transformers"] = "mobilevit"
    """Whose names and channel order to write."""
    source_channel_order: Literal["rgb", "bgr"] | None = None
    """rgb: leave the stem's channels as they are; bgr: turn them round. Without it, by the families' conventions."""

    def run(self) -> int:
        """Convert and say what was recognised."""
        from safetensors.torch import save as serialize

        from mobilevit import factory
        from mobilevit.files import write_bytes
        from mobilevit.weights import checkpoint
        from mobilevit.weights.convert import convert_state_dict, detect_family, unwrap_state_dict

        if self.target.suffix != ".safetensors":
            raise ValueError(f"{self.target}: name the target .safetensors")
        content, _ = checkpoint.read(self.source)
        state = unwrap_state_dict(content)
        family = detect_family(state)
        if self.to == "mobilevit" and self.source_channel_order is None:
            checkpoint.save(factory.load(self.source), self.target)
        else:
            converted = convert_state_dict(state, to=self.to, source_channel_order=self.source_channel_order)
            tensors = {key: value.contiguous() for key, value in converted.items()}
            write_bytes(self.target, serialize(tensors, {"format": "pt"}))
        print(f"{self.source} ({family}) -> {self.target} ({self.to})")
        return 0


# -- benchmark --------------------------------------------------------------------------------------------------------


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
    """Pictures in a run."""
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
    """int8: a folder of pictures of what the model will see."""
    data: str | None = None
    """Labelled pictures, as for training: also accuracy, of our model in each engine."""
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
        from mobilevit.benchmark.report import case_title
        from mobilevit.benchmark.run import benchmark
        from mobilevit.models import MODELS
        from mobilevit.models.card import card_of

        if len(self.image_size) > 2:
            raise ValueError("--image-size takes one number, or height and width")
        measure = None
        if self.data is not None:
            if self.model in MODELS:
                raise ValueError(f"--data: {self.model} by name has fresh weights; name a checkpoint")
            measure = _measure_on(self.data, card_of(factory.load(self.model)))
        report = benchmark(
            self.model,
            task=self.task,
            image_size=(self.image_size[0], self.image_size[-1]) if self.image_size else None,
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
            _print_json(report.to_dict())
            return 1 if report.failures else 0
        for case in report.cases:
            print(f"\n{report.model}, {case_title(case, report.device)}, {report.machine.processor}")
            _print_rows(*report.table(case))
        for line in report.notes():
            print(line)
        if self.out is not None:
            print(f"\nfigures, picture and exported files: {self.out}")
        return 1 if report.failures else 0


# -- tune -------------------------------------------------------------------------------------------------------------


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
    """Pictures in a run."""
    threads: int | None = None
    """To compute with; all cores and half of them are tried, if not given."""
    pictures: Path | None = None
    """Folder of pictures to compare answers on; built-in photographs, or those of --calibration, if not given."""
    calibration: Path | None = None
    """int8: a folder of pictures of what the model will see."""
    data: str | None = None
    """Labelled pictures, as for training: --max-loss is then of accuracy."""
    rounds: int = 10
    """Turns of each engine."""
    out: Path | None = None
    """Folder for the result instead of the checkpoint's, where --engine auto looks."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure, keep the winner, print."""
        from mobilevit import factory
        from mobilevit.benchmark.tune import tune
        from mobilevit.models.card import card_of

        tuned = tune(
            self.checkpoint,
            out=self.out,
            pictures=self.pictures,
            calibration=self.calibration,
            max_loss=self.max_loss,
            batch_size=self.batch_size,
            threads=self.threads,
            engines=self.engines,
            precisions=self.precisions,
            evaluate=None if self.data is None else _measure_on(self.data, card_of(factory.load(self.checkpoint))),
            rounds=self.rounds,
        )
        if self.json:
            _print_json(tuned.to_dict())
            return 0
        _print_rows(*tuned.table())
        for name, why in tuned.dropped:
            print(f"left out: {name}: {why}")
        print(f"\nfastest: {tuned.engine}, {tuned.precision}, {tuned.threads} threads: {tuned.median_ms:.1f} ms")
        print(f"{tuned.path}  (used by --engine auto on this machine)")
        return 0


# -- serve ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer over HTTP: predictions in batches, a web page, metrics; for one or more models."""

    checkpoints: Positional[tuple[str, ...]]
    """Checkpoints or exported files, each FILE or NAME=FILE; a request that names no model gets the first."""
    settings: Annotated[ServeConfig, arg(name="")]

    def run(self) -> int:
        """Serve until told to stop."""
        from mobilevit.serving.settings import name_models
        from mobilevit.webpage import page_files

        models = name_models(self.checkpoints)
        # Threads that wait for each other while they spin take the cores from those that read pictures.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            from mobilevit.serving.run import serve
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed; pip install 'mobilevit[serve]'") from None
        pages = page_files("server")
        return serve(self.settings, models, pages, lambda address: print(f"serving at {address}", flush=True))


# -- demo -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, evaluate, save, reload and predict on built-in pictures: some minutes on two cores, no download."""

    task: Literal["classification", "detection", "segmentation"] = "classification"
    """What the model is to learn."""
    out: Path = Path("demo")
    """Folder for data, run and report.html; a former demo in it is replaced."""
    epochs: int | None = None
    """Passes over the training pictures. By the task, if not given."""
    num_images: int | None = None
    """Pictures to draw. By the task, if not given."""
    seed: int = 0
    """Decides pictures and training."""

    def run(self) -> int:
        """Run the demo."""
        from mobilevit.demo import run_demo

        report = run_demo(self.out, self.task, epochs=self.epochs, num_images=self.num_images, seed=self.seed)
        print(f"\nopen {report}")
        return 0


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """Labelled data before training: `data check DIR` finds what is wrong, `data shard DIR --out DIR` packs tar files.

    Check draws a sheet of labelled pictures. Shard writes tar files as WebDataset has them, with an index: few large
    files instead of many small ones, for network file systems, object stores and spinning disks.
    """

    action: Positional[Literal["check", "shard"]]
    """What to do."""
    path: Positional[str]
    """Labelled pictures, as for training."""
    task: Literal["auto", "classification", "detection", "segmentation"] = "auto"
    """auto: what the data are labelled for; shards are for classification."""
    out: Path | None = None
    """check: the sheet to draw; data-check.png if not given. shard: the folder to write."""
    max_mb: float = 256.0
    """shard: size of a tar file in megabytes."""
    shorter_side: int | None = None
    """shard: make larger pictures this small on their shorter side, as JPEG of quality 95. Without it, as they are."""
    val_fraction: float | None = None
    """shard: share of every class for a val part, where the data are not divided. Without it, all is one part."""
    seed: int = 0
    """shard: decides the order of the pictures, and with --val-fraction the parts, as it does in training."""
    overwrite: bool = False
    """shard: replace the shards in --out."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Check or pack, print."""
        task = None if self.task == "auto" else self.task
        if self.action == "shard":
            return self._shard(task)
        from mobilevit.data.check import check, contact_sheet
        from mobilevit.drawing import save_image

        out = self.out or Path("data-check.png")
        report = check(self.path, task)
        save_image(contact_sheet(report.splits), out)
        if self.json:
            _print_json(report.to_dict())
        else:
            print(*report.lines(), sep="\n")
            print(f"\nlabelled pictures: {out}")
        return 0

    def _shard(self, task: Task | None) -> int:
        from mobilevit.data.shard_writing import write_shards

        if self.out is None:
            raise UsageError("--out names the folder to write the shards into; give it")
        report = write_shards(
            self.path,
            self.out,
            task=task,
            max_bytes=round(self.max_mb * 1e6),
            shorter_side=self.shorter_side,
            val_fraction=self.val_fraction,
            seed=self.seed,
            overwrite=self.overwrite,
        )
        if self.json:
            _print_json(report.to_dict())
        else:
            print(*report.lines(), sep="\n")
        return 0


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "explain": Explain,
    "export": Export,
    "benchmark": Benchmark,
    "tune": Tune,
    "serve": Serve,
    "info": Info,
    "convert": Convert,
    "data": Data,
    "demo": Demo,
}

# -- entry ------------------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 2 a user's mistake, 1 anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        if arguments[0] == "--version":
            from mobilevit import __version__

            print(f"mobilevit {__version__}")
            return 0
        command = _parse(arguments[0], arguments[1:])
        return 0 if command is None else command.run()
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        return _explain(error)


def _parse(name: str, arguments: list[str]) -> Command | None:
    """The command with its options; None if it only asked for help."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown command {name!r}; {hint}Commands are {', '.join(COMMANDS)}")
    if name == "train" and _value_of("--recipe", arguments) == "list":
        print(describe_recipes())
        return None
    defaults: dict[str, Any] = {"default": _train_defaults(arguments)} if name == "train" else {}
    said = io.StringIO()
    try:
        # tyro reports bad flags in a box of several lines; users and programs get one line instead.
        with contextlib.redirect_stderr(said):
            command: Command = tyro.cli(COMMANDS[name], prog=f"mobilevit {name}", args=arguments, **defaults)
            return command
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise UsageError(_one_line(said.getvalue())) from None


def _train_defaults(arguments: list[str]) -> Train:
    """Defaults of `train`: those of the file behind --config, or of the run to resume, if there is one."""
    file = _value_of("--config", arguments)
    out = _value_of("--out", arguments)
    if file is None and out is not None and "--resume" in arguments and (Path(out) / "config.json").exists():
        file = str(Path(out) / "config.json")
    recipe = _value_of("--recipe", arguments)
    if file is None:
        settings: dict[str, Any] = {} if recipe is None else find_recipe(recipe).settings
        return Train(settings=TrainConfig(**{"data": tyro.MISSING, **settings}), recipe=recipe)
    if recipe is not None:
        raise UsageError("--recipe and --config both give settings; leave one of them out")
    return Train(settings=TrainConfig.from_json(Path(file)), config=Path(file))


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def _one_line(box: str) -> str:
    """The words of a tyro error without its frame."""
    lines = [line.strip("╭╮╰╯│─ ") for line in box.splitlines()]
    return " ".join(line for line in lines[1:] if line)


_WRONG_PATH = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)


def _explain(error: Exception) -> int:
    """Say what went wrong; a user's mistake in one line, anything else with its traceback."""
    from mobilevit.files import DiskFullError, disk_is_full

    if type(error).__name__ == "TrainingInterrupted":
        print(error, file=sys.stderr)
        return 1
    if isinstance(error, DiskFullError):
        return _mistake(str(error.strerror))
    if disk_is_full(error):
        return _mistake(f"no room on the disk ({error}); free some space")
    if isinstance(error, OSError) and error.errno in _WRONG_PATH:
        return _mistake(f"{error.filename}: {error.strerror}")
    if type(error).__name__ == "OutOfMemoryError":
        return _mistake("the GPU has too little memory; lower --batch-size or --image-size")
    if type(error).__name__ == "ShardError":
        # A worker process's is told with its traceback in the text, the message at the end.
        return _mistake(str(error).rstrip().rpartition("\n")[2].rpartition("ShardError: ")[2])
    if isinstance(error, ValueError) and _raised_by_us(error):
        return _mistake(str(error))
    traceback.print_exception(error)
    return 1


def _raised_by_us(error: Exception) -> bool:
    """Whether this package noticed a mistake, rather than some library a bug of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _mistake(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _log_to_stderr() -> None:
    logger = logging.getLogger("mobilevit")
    # Made anew each time: standard error may be another stream than at the last call in this process.
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_summary(command)}" for name, command in COMMANDS.items()]
    head = ("usage: mobilevit COMMAND ...", "", "MobileViT: from a folder of pictures to a small, fast model.", "")
    return "\n".join([*head, "commands:", *lines, "", "mobilevit COMMAND --help shows the options of a command."])


def _summary(command: type[Command]) -> str:
    return (command.__doc__ or "").splitlines()[0]


# -- printing ---------------------------------------------------------------------------------------------------------


def _print_json(value: dict[str, Any]) -> None:
    print(_as_json(value, indent=2))


def _print_json_line(value: dict[str, Any]) -> None:
    print(_as_json(value), flush=True)


def _as_json(value: dict[str, Any], indent: int | None = None) -> str:
    """With the odd bytes of file names that are not UTF-8 escaped, as JSON is UTF-8 and nothing else."""
    return jsonlib.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _as_dict(result: Result, top: int, min_score: float | None) -> dict[str, Any]:
    from mobilevit.tasks.classification import ClassificationResult
    from mobilevit.tasks.detection import DetectionResult

    if isinstance(result, ClassificationResult):
        return result.to_dict(top)
    return result.to_dict(min_score=min_score) if isinstance(result, DetectionResult) else result.to_dict()


def _draw(result: Result, path: Path, top: int, min_score: float | None) -> None:
    from mobilevit.tasks.classification import ClassificationResult
    from mobilevit.tasks.detection import DetectionResult

    if isinstance(result, ClassificationResult):
        result.draw(path, k=top)
    elif isinstance(result, DetectionResult):
        result.draw(path, min_score=min_score)
    else:
        result.draw(path)


def _print_prediction(result: Result, width: int, top: int, min_score: float | None) -> None:
    from mobilevit.tasks.classification import ClassificationResult
    from mobilevit.tasks.detection import DetectionResult

    if isinstance(result, ClassificationResult):
        told = "   ".join(f"{label} {probability:6.1%}" for label, probability in result.top(top))
    elif isinstance(result, DetectionResult):
        told = result.describe(min_score)
    else:
        told = result.describe()
    print(f"{result.source:<{width}}  {told}", flush=True)


def _print_report(report: Report) -> None:
    headline = report.headline()
    print(f"\n{report.num_images:,} pictures")
    width = max(len(name) for name, _ in headline)
    for name, value in headline:
        print(f"  {name:<{width}}  {value:>8}")
    heading, rows = report.table()
    if len(rows) <= 100:
        table = _table(*heading)
        for row in rows:
            table.add_row(*row)
        _print_table(table)


def _print_summary(name: str, summary: Summary, card: ModelCard, *, named: bool) -> None:
    height, width = summary.input_size
    print(f"{name}, {card.task}, at {height} x {width}")
    if not named:
        few = ", ".join(card.classes[:8]) + (" ..." if len(card.classes) > 8 else "")
        print(f"{len(card.classes)} classes: {few}")
        for told in (card.metrics, card.provenance):
            print(", ".join(f"{key} {value}" for key, value in told.items()))
    table = _table("layer", "kind", "output (C, H, W)", "parameters", "MACs", "activations")
    for row in summary.layers:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}")
    table.add_section()
    table.add_row("total", "", "", f"{summary.parameters:,}", f"{summary.macs:,}", f"{summary.activations:,}")
    _print_table(table)
    print("\nOne product of queries and keys, in multiply-adds; C is the transformer's width")
    table = _table("block", "map", "patch", "C", "plain attention", "same-offset attention", "saved")
    for block in summary.attention:
        (h, w), (ph, pw) = block.map_size, block.patch_size
        p, n = block.num_sequences, block.num_tokens
        table.add_row(
            block.name, f"{h} x {w}", f"{ph} x {pw}", str(block.embed_dim),
            f"{h * w} * {h * w} * C = {block.plain_cost_per_channel:,} C",
            f"{p} * {n} * {n} * C = {block.cost_per_channel:,} C",
            f"{block.plain_cost_per_channel / block.cost_per_channel:.0f} x",
        )  # fmt: skip
    _print_table(table)


def _print_rows(heading: list[str], rows: list[list[str]]) -> None:
    table = _table(*heading)
    for row in rows:
        table.add_row(*row)
    _print_table(table)


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "kind" else "right")
    return table


def _print_table(table: Table) -> None:
    from rich.console import Console

    # Into a file or a pipe, rich would cut tables at 80 columns.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
