"""`mobilevit predict`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, cast

from tyro.conf import Positional, arg

from mobilevit.cli.errors import UsageError
from mobilevit.cli.printing import print_json
from mobilevit.errors import ImageError
from mobilevit.files import as_utf8, reading_from, write_json
from mobilevit.imaging.decode import Source
from mobilevit.progress import Progress
from mobilevit.results import check_options
from mobilevit.results.base import Result
from mobilevit.results.detection import DetectionResult
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime.bulk import PredictOptions, predict_in_bulk
from mobilevit.runtime.sources import find_local, find_sources

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify, detect or segment: files, folders, globs, or - for standard input (an image, or one path per line)."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    images: Positional[tuple[str, ...]]
    """Files, folders (all images below), globs, or -; with --out also URLs such as s3://bucket/folder."""
    options: Annotated[PredictOptions, arg(name="")]
    save: Path | None = None
    """Folder to write the images to, with their labels, boxes or colors."""
    coco: Path | None = None
    """Detection: file to write all objects to, in the format of COCO results; image_id counts the images from 1."""
    json: bool = False
    """Print one line of JSON per image; with --out, a summary."""
    out: Path | None = None
    """For many images: folder to write predictions to, as parquet files, instead of printing. The same command
    continues after a stop; an image that cannot be read gets a row with its error."""

    def run(self) -> int:
        """Predict; return 2 if an image could not be read, after all the others."""
        if not self.images:
            raise UsageError("no images; name files, folders, globs, or - for standard input")
        return self._print_results() if self.out is None else self._write_rows(self.out)

    def _print_results(self) -> int:
        options = self.options
        for flag, is_given in (
            ("--engine ray", options.engine == "ray"), ("--overwrite", options.overwrite),
            ("--workers", options.workers is not None), ("--ray-address", options.ray_address is not None),
        ):  # fmt: skip
            if is_given:
                raise UsageError(f"{flag} is for parquet files; name a folder for them with --out")
        predictor = options.open(self.checkpoint, threads=options.threads)
        given = {"coco": self.coco, "min_score": options.min_score, "masks": options.masks}
        check_options(predictor.card.task, [name for name, value in given.items() if value is not None])
        from_stdin = self.images == ("-",)
        found: list[Source] = [] if from_stdin else [name for place in self.images for name in find_local(place)]
        width = min(max((len(str(name)) for name in found), default=40), 60)
        failed, saved_stems = 0, set[str]()
        objects: list[dict[str, object]] = []
        # A terminal shows the printed results instead of the progress.
        with Progress("predict", len(found), silent=sys.stdout.isatty() or from_stdin) as progress:
            sources = _read_standard_input() if from_stdin else found
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

    def _print(self, result: Result, width: int) -> None:
        top, min_score = self.options.top, self.options.min_score
        if self.json:
            print_json(result.to_dict(top=top, min_score=min_score), indent=None)
        else:
            described = result.describe(top=top, min_score=min_score)
            print(as_utf8(f"{result.source:<{width}}  {described}"), flush=True)

    def _print_error(self, error: ImageError) -> None:
        print(f"error: {error}", file=sys.stderr)
        if self.json:
            name, _, reason = str(error).partition(": ")
            print_json({"source": name, "error": reason}, indent=None)

    def _save(self, result: Result, taken: set[str]) -> None:
        """Write the files of --save and --masks; images of the same name in different folders get a number."""
        name = stem = Path(result.source).stem
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        if self.save is not None:
            result.draw(self.save / f"{name}.jpg", top=self.options.top, min_score=self.options.min_score)
        if self.options.masks is not None:
            assert isinstance(result, SegmentationResult)
            result.save_mask(self.options.masks / f"{name}.png")

    def _write_rows(self, out: Path) -> int:
        """Write parquet files; return 2 if an image could not be read, 1 if a signal stopped it."""
        for flag, given in (("--save", self.save), ("--coco", self.coco)):
            if given is not None:
                raise UsageError(f"{flag} and --out do not go together; leave one out")
        if self.options.ray_address is not None and self.options.engine != "ray":
            raise UsageError("--ray-address is for --engine ray")
        named = _lines(_standard_input()) if self.images == ("-",) else self.images
        report = predict_in_bulk(self.checkpoint, find_sources(named), out, self.options)
        if self.json:
            print_json(report.to_dict())
        else:
            print(as_utf8(report.describe()))
        return 1 if report.stopped else 2 if report.num_errors else 0


def _read_standard_input() -> Iterator[Source]:
    """Read an image, or one path per line."""
    stream = _standard_input()
    with reading_from("standard input"):
        if _is_image(stream.peek(64)[:64]):
            yield stream.read()
            return
    yield from _lines(stream)


def _is_image(start: bytes) -> bool:
    """Return whether data is an image, by its first bytes: all formats have a zero there, and no path has one."""
    return b"\0" in start


def _standard_input() -> BufferedReader:
    if sys.stdin is None:
        raise UsageError("standard input is closed; pipe an image or a list of paths into it, or name files")
    return cast(BufferedReader, sys.stdin.buffer)  # the declared type has no `peek`


def _lines(stream: BufferedReader) -> Iterator[str]:
    with reading_from("standard input"):
        for line in stream:
            if name := os.fsdecode(line).strip():
                yield name
