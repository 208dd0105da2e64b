"""`mobilevit predict`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tyro.conf import Positional

from mobilevit.cli.errors import UsageError
from mobilevit.cli.printing import print_json, print_json_line
from mobilevit.errors import MobileViTError

if TYPE_CHECKING:
    from io import BufferedReader

    from mobilevit.imaging.decode import Source

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify, detect or segment: files, folders, globs, or - for standard input (an image, or a path a line)."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    images: Positional[tuple[str, ...]]
    """Files, folders (all images below), globs, or -; with --out, places such as s3://bucket/folder, too."""
    save: Path | None = None
    """Write the images with their labels, boxes or colors into this folder."""
    top: int = 3
    """Classification: how many labels to show."""
    min_score: float | None = None
    """Detection: show objects from this score on. Without it, what balanced precision and recall in validation."""
    coco: Path | None = None
    """Detection: write all objects into this file, as COCO's results are; image_id counts the images from 1."""
    masks: Path | None = None
    """Segmentation: write label maps as palette PNGs into this folder."""
    batch_size: int | None = None
    """Images that go through the model together; without it, 16 of 256 x 256 pixels and more of smaller inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """To compute with on the CPU; all cores if not given."""
    engine: Literal["torch", "compile", "auto", "ray"] = "torch"
    """What runs a checkpoint; auto: what `mobilevit tune` found. ray, with --out: PyTorch, or an exported file's own
    runtime, in many processes of Ray Data, on this machine or a cluster."""
    json: bool = False
    """One line of JSON an image; with --out, what was done."""
    out: Path | None = None
    """For many images: write rows into parquet files in this folder instead of printing. The same command goes on
    where it was stopped; an image that cannot be read gets a row with its error."""
    overwrite: bool = False
    """With --out: replace what is there."""
    workers: int | None = None
    """With --out: batches at work at once; with ray, processes with a model each. As many as cores, if not given."""
    ray_address: str | None = None
    """With ray: the cluster, such as auto or ray://head:10001. Without it, RAY_ADDRESS, or this machine alone."""

    def run(self) -> int:
        """Predict; 2 if an image could not be read, after the others."""
        if self.out is not None:
            return self._run_in_bulk(self.out)
        for flag, is_given in (
            ("--engine ray", self.engine == "ray"), ("--overwrite", self.overwrite),
            ("--workers", self.workers is not None), ("--ray-address", self.ray_address is not None),
        ):  # fmt: skip
            if is_given:
                raise UsageError(f"{flag} is for parquet files; name a folder for them with --out")
        from mobilevit.errors import ImageError
        from mobilevit.files import write_json
        from mobilevit.progress import Progress
        from mobilevit.results.detection import DetectionResult
        from mobilevit.results.segmentation import SegmentationResult
        from mobilevit.runtime.predictor import Predictor

        if not self.images:
            raise UsageError("no images; name files, folders, globs, or - for standard input")
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
                raise MobileViTError(f"{flag} is for {its_task}; this checkpoint does {task}")
        sources, total = _sources(self.images)
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
                        print_json_line({"source": name, "error": reason})
                    continue
                if self.json:
                    print_json_line(result.to_dict(top=self.top, min_score=self.min_score))
                else:
                    print(
                        f"{result.source:<{width}}  {result.describe(top=self.top, min_score=self.min_score)}",
                        flush=True,
                    )
                if self.coco is not None and isinstance(result, DetectionResult):
                    coco += [{**row, "file_name": result.source} for row in result.to_coco(number)]
                if self.save is None and self.masks is None:
                    continue
                stem = names.free(Path(result.source).stem)
                if self.save is not None:
                    result.draw(self.save / f"{stem}.jpg", top=self.top, min_score=self.min_score)
                if self.masks is not None and isinstance(result, SegmentationResult):
                    result.save_mask(self.masks / f"{stem}.png")
        if self.coco is not None:
            write_json(self.coco, coco)
        if failed:
            log.error("error: %d of the images cannot be read; the others are done", failed)
        return 2 if failed else 0

    def _run_in_bulk(self, out: Path) -> int:
        """Rows into parquet files; 2 if an image could not be read, 1 if it was stopped."""
        from mobilevit.runtime.bulk import BulkJob, predict_in_bulk
        from mobilevit.runtime.sources import find_sources

        for flag, given in (("--save", self.save), ("--coco", self.coco)):
            if given is not None:
                raise UsageError(f"{flag} and --out do not go together; leave one out")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("--ray-address is for --engine ray")
        if not self.images:
            raise UsageError("no images; name files, folders, globs, places such as s3://bucket/folder, or -")
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
        named: Sequence[str] = self.images
        if list(named) == ["-"]:
            lines = (os.fsdecode(line).strip() for line in sys.stdin.buffer)
            named = [line for line in lines if line]
        report = predict_in_bulk(job, find_sources(named))
        if self.json:
            print_json(report.to_dict())
        else:
            print(report.describe())
        return 1 if report.stopped else 2 if report.num_errors else 0


def _sources(arguments: Sequence[str]) -> tuple[Sequence[Source] | Iterator[Source], int]:
    """Images for what a user named, and how many (0: not known)."""
    from mobilevit.runtime.sources import find_local

    if list(arguments) == ["-"]:
        return _from_standard_input(), 0
    found: list[Source] = [name for argument in arguments for name in find_local(argument)]
    return found, len(found)


def _from_standard_input() -> Iterator[Source]:
    stream = cast("BufferedReader", sys.stdin.buffer)  # of which the declared type cannot look ahead
    start = stream.peek(12)[:12]
    if start.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")):
        yield stream.read()
        return
    for line in stream:
        if name := line.decode(errors="replace").strip():
            yield name


class _FreeNames:
    """Gives each saved image a name of its own: images in different folders may share theirs."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, stem: str) -> str:
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return name
