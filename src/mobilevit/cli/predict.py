"""`mobilevit predict`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from tyro.conf import Positional

from mobilevit.cli.errors import UsageError
from mobilevit.cli.printing import print_json, print_json_line
from mobilevit.errors import ImageError
from mobilevit.files import as_utf8, reading_from, write_json

if TYPE_CHECKING:
    from io import BufferedReader

    from mobilevit.imaging.decode import Source
    from mobilevit.results.base import Result
    from mobilevit.runtime.predictor import Predictor

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify, detect or segment: files, folders, globs, or - for standard input (an image, or one path per line)."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    images: Positional[tuple[str, ...]]
    """Files, folders (all images below), globs, or -; with --out also URLs such as s3://bucket/folder."""
    save: Path | None = None
    """Folder to write the images to, with their labels, boxes or colors."""
    top: int = 3
    """Classification: number of labels to show."""
    min_score: float | None = None
    """Detection: show objects with at least this score. Default: the best balance of precision and recall in
    validation."""
    coco: Path | None = None
    """Detection: file to write all objects to, in the format of COCO results; image_id counts the images from 1."""
    masks: Path | None = None
    """Segmentation: folder to write label maps to, as palette PNGs."""
    batch_size: int | None = None
    """Images that go through the model together. Default: 16 of 256 x 256 pixels, more of smaller inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    engine: Literal["torch", "compile", "auto", "ray"] = "torch"
    """Engine of a checkpoint; auto: the fastest that `mobilevit tune` found. ray, with --out: many processes of Ray
    Data, on this machine or a cluster, with PyTorch or the engine of an exported file."""
    trust_pt2: bool = False
    """Load a .pt2 file, although that can run code that came with it."""
    json: bool = False
    """Print one line of JSON per image; with --out, a summary."""
    out: Path | None = None
    """For many images: folder to write predictions to, as parquet files, instead of printing. The same command
    continues after a stop; an image that cannot be read gets a row with its error."""
    overwrite: bool = False
    """With --out: replace the predictions in the folder."""
    workers: int | None = None
    """With --out: batches in progress at a time; with ray: processes with a model each. Default: as many as cores."""
    ray_address: str | None = None
    """With ray: the cluster, such as auto or ray://head:10001. Default: RAY_ADDRESS, or this machine alone."""

    def run(self) -> int:
        """Predict; return 2 if an image could not be read, after all the others."""
        if not self.images:
            raise UsageError("no images; name files, folders, globs, or - for standard input")
        if self.top < 1:
            raise UsageError(f"--top is {self.top}; give 1 or more")
        if self.out is not None:
            return self._write_rows(self.out)
        for flag, is_given in (
            ("--engine ray", self.engine == "ray"), ("--overwrite", self.overwrite),
            ("--workers", self.workers is not None), ("--ray-address", self.ray_address is not None),
        ):  # fmt: skip
            if is_given:
                raise UsageError(f"{flag} is for parquet files; name a folder for them with --out")
        return self._print_results()

    def _print_results(self) -> int:
        from mobilevit.progress import Progress
        from mobilevit.results.detection import DetectionResult

        predictor = self._open()
        sources, total = _find(self.images)
        width = min(max(len(str(source)) for source in sources), 60) if isinstance(sources, list) else 40
        failed, saved_stems = 0, set[str]()
        objects: list[dict[str, object]] = []
        # A terminal shows the printed results instead of the progress.
        with Progress("predict", total, silent=sys.stdout.isatty() or not total) as progress:
            for number, result in enumerate(predictor.stream(sources), start=1):
                progress.advance(1)
                if isinstance(result, ImageError):
                    failed += 1
                    self._print_error(result)
                    continue
                self._print(result, width)
                self._save(result, saved_stems)
                if self.coco is not None:
                    assert isinstance(result, DetectionResult)
                    objects += [{**row, "file_name": result.source} for row in result.to_coco(number)]
        if self.coco is not None:
            write_json(self.coco, objects)
        if failed:
            log.error("error: %d of the images cannot be read; the others are done", failed)
        return 2 if failed else 0

    def _open(self) -> Predictor:
        from mobilevit.results import check_options
        from mobilevit.runtime.predictor import Predictor

        assert self.engine != "ray"
        predictor = Predictor(
            self.checkpoint,
            device=self.device,
            batch_size=self.batch_size,
            threads=self.threads,
            engine=self.engine,
            trust_pt2=self.trust_pt2,
        )
        given = [name for name in ("coco", "min_score", "masks") if getattr(self, name) is not None]
        check_options(predictor.card.task, given)
        return predictor

    def _print(self, result: Result, width: int) -> None:
        if self.json:
            print_json_line(result.to_dict(top=self.top, min_score=self.min_score))
            return
        described = result.describe(top=self.top, min_score=self.min_score)
        print(as_utf8(f"{result.source:<{width}}  {described}"), flush=True)

    def _print_error(self, error: ImageError) -> None:
        print(f"error: {error}", file=sys.stderr)
        if self.json:
            name, _, reason = str(error).partition(": ")
            print_json_line({"source": name, "error": reason})

    def _save(self, result: Result, taken: set[str]) -> None:
        """Write the files of --save and --masks; images of the same name in different folders get a number."""
        from mobilevit.results.segmentation import SegmentationResult

        if self.save is None and self.masks is None:
            return
        name = stem = Path(result.source).stem
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        if self.save is not None:
            result.draw(self.save / f"{name}.jpg", top=self.top, min_score=self.min_score)
        if self.masks is not None:
            assert isinstance(result, SegmentationResult)
            result.save_mask(self.masks / f"{name}.png")

    def _write_rows(self, out: Path) -> int:
        """Write parquet files; return 2 if an image could not be read, 1 if a signal stopped it."""
        from mobilevit.runtime.bulk import BulkJob, predict_in_bulk
        from mobilevit.runtime.sources import find_sources

        for flag, given in (("--save", self.save), ("--coco", self.coco)):
            if given is not None:
                raise UsageError(f"{flag} and --out do not go together; leave one out")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("--ray-address is for --engine ray")
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
            trust_pt2=self.trust_pt2,
            workers=self.workers,
            ray_address=self.ray_address,
            overwrite=self.overwrite,
        )
        named = list(_lines(_standard_input())) if self.images == ("-",) else self.images
        report = predict_in_bulk(job, find_sources(named))
        if self.json:
            print_json(report.to_dict())
        else:
            print(as_utf8(report.describe()))
        return 1 if report.stopped else 2 if report.num_errors else 0


def _find(arguments: tuple[str, ...]) -> tuple[list[Source] | Iterator[Source], int]:
    """Find the images that the arguments name, and count them; 0: the number is not known."""
    from mobilevit.runtime.sources import find_local

    if arguments == ("-",):
        return _read_standard_input(), 0
    found: list[Source] = [name for argument in arguments for name in find_local(argument)]
    return found, len(found)


def _read_standard_input() -> Iterator[Source]:
    stream = _standard_input()
    with reading_from("standard input"):
        if _is_image(stream.peek(12)[:12]):
            yield stream.read()
            return
    yield from _lines(stream)


def _is_image(start: bytes) -> bool:
    """Return whether data is an image, and not a list of paths, by its first 12 bytes."""
    return (
        start.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*"))
        or (start.startswith(b"RIFF") and start.endswith(b"WEBP"))
        or (start.startswith(b"BM") and start[6:10] == bytes(4))
        or start[4:].startswith(b"ftypavi")
    )


def _standard_input() -> BufferedReader:
    if sys.stdin is None:
        raise UsageError("standard input is closed; pipe an image or a list of paths into it, or name files")
    return cast("BufferedReader", sys.stdin.buffer)  # the declared type has no `peek`


def _lines(stream: BufferedReader) -> Iterator[str]:
    with reading_from("standard input"):
        for line in stream:
            if name := os.fsdecode(line).strip():
                yield name
