"""Everything that can be said of data before training on them: what is in them, and what is wrong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import Task
from mobilevit.class_names import IGNORE
from mobilevit.data.boxes import size_problem
from mobilevit.data.datasets import find_splits
from mobilevit.data.imageset import Boxes, ImageSet, Mask, Problem, read_label_map
from mobilevit.data.mask_layouts import unusable_mask, values_without_class
from mobilevit.data.shards import holds_shards
from mobilevit.errors import ImageError
from mobilevit.imaging import drawing
from mobilevit.imaging.decode import IMAGE_SUFFIXES, read_image
from mobilevit.machine import available_cores
from mobilevit.progress import Progress

_SHOWN_PROBLEMS = 10
_SHOWN_CLASSES = 40
_LEGEND_CLASSES = 12  # of boxes
_SMALL, _LARGE = 32**2, 96**2  # pixels; COCO's limits between small, medium and large


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What is in one part of the data."""

    images: int
    """Images in use."""
    readable: int
    """Of these, how many could be decoded."""
    smallest: tuple[int, int]
    """(width, height) of the image with the fewest pixels; (0, 0) where none is readable."""
    largest: tuple[int, int]
    """Of the one with the most."""
    images_of: dict[str, int]
    """Of each class: images that show it."""
    objects_of: dict[str, int] = field(default_factory=dict)
    """Detection, of each class: boxes, without crowds."""
    pixels_of: dict[str, float] = field(default_factory=dict)
    """Segmentation, of each class: its share of the pixels that have one."""
    void: float = 0.0
    """Segmentation: share of all pixels that have no class."""
    without_objects: int = 0
    """Detection: images without any."""
    crowds: int = 0
    """Detection: boxes that are neither trained on nor counted."""
    box_sizes: dict[str, int] = field(default_factory=dict)
    """Detection: boxes by area, small below 32 x 32 pixels and large from 96 x 96."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check` found."""

    path: str
    """What was checked."""
    task: Task
    """What the data are labeled for."""
    classes: tuple[str, ...]
    """Class names."""
    statistics: dict[str, SplitStatistics]
    """By part: "train", "val", "test", or "all"."""
    problems: tuple[Problem, ...]
    """What is wrong, in the order of `by_kind`."""
    splits: dict[str, ImageSet[Any]] = field(repr=False)
    """The data themselves, for `contact_sheet`."""

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems, by what sort they are; the rarest sorts come first."""
        groups: dict[str, list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault(problem.kind, []).append(problem)
        return dict(sorted(groups.items(), key=lambda item: len(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "task": self.task,
            "classes": list(self.classes),
            "splits": {part: asdict(statistics) for part, statistics in self.statistics.items()},
            "problem_counts": {kind: len(problems) for kind, problems in self.by_kind().items()},
            "problems": [asdict(problem) for problem in self.problems],
        }

    def lines(self) -> list[str]:
        """The report to print: the parts, a table of the classes, the problems by kind, the first ten of each."""
        images = sum(part.images for part in self.statistics.values())
        lines = [f"{self.path}: {self.task}, {len(self.classes)} classes, {images:,} images"]
        lines += [f"  {part}: {_described(statistics)}" for part, statistics in self.statistics.items()]
        lines += ["", *self._table(), ""]
        if not self.problems:
            return [*lines, "no problems found"]
        lines.append(f"{len(self.problems):,} {'problem' if len(self.problems) == 1 else 'problems'}")
        for kind, problems in self.by_kind().items():
            lines.append(f"  {kind}: {len(problems):,}")
            lines += [f"    {_without_kind(problem)}" for problem in problems[:_SHOWN_PROBLEMS]]
            if len(problems) > _SHOWN_PROBLEMS:
                lines.append(f"    and {len(problems) - _SHOWN_PROBLEMS:,} more")
        return lines

    def _table(self) -> list[str]:
        what = {"classification": "images", "detection": "objects (images)", "segmentation": "pixels (images)"}
        rows = [[f"class, {what[self.task]}", *self.statistics]]
        rows += [
            [name, *(_cell(part, name, self.task) for part in self.statistics.values())]
            for name in self.classes[:_SHOWN_CLASSES]
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        more = len(self.classes) - _SHOWN_CLASSES
        return [f"  {row}" for row in table] + ([f"  and {more} more classes"] if more > 0 else [])


def _without_kind(problem: Problem) -> str:
    what = "; ".join(text for text in (problem.detail, problem.remedy) if text)
    return f"{problem.file}: {what}" if what else problem.file


def _cell(part: SplitStatistics, name: str, task: Task) -> str:
    images = f"{part.images_of[name]:,}"
    if task == "classification":
        return images
    first = f"{part.objects_of[name]:,}" if task == "detection" else f"{part.pixels_of[name]:.2%}"
    return f"{first} ({images})"


def _described(part: SplitStatistics) -> str:
    words = [f"{part.images:,} images"]
    if part.readable < part.images:
        words.append(f"{part.images - part.readable:,} of them unreadable")
    small, large = (f"{width} x {height}" for width, height in (part.smallest, part.largest))
    words.append(small if small == large else f"{small} to {large}")
    if part.box_sizes:
        sizes = ", ".join(f"{count:,} {size}" for size, count in part.box_sizes.items())
        words.append(f"{sum(part.objects_of.values()):,} objects ({sizes})")
        words.append(f"{part.without_objects:,} images without any")
        if part.crowds:
            words.append(f"{part.crowds:,} crowds, not counted")
    if part.pixels_of:
        words.append(f"{part.void:.2%} of the pixels void")
    return ", ".join(words)


def check(path: str | os.PathLike[str], task: Task | None = None) -> CheckReport:
    """Read the annotations and open every image and mask.

    Args:
        path: as for training.
        task: None recognizes it by the layout.

    Raises:
        ValueError: nothing usable there.
    """
    splits = find_splits(path, task)
    first = next(iter(splits.values()))
    problems = [problem for data in splits.values() for problem in data.problems]
    looks: dict[str, list[_Look]] = {}
    with Progress("check", sum(map(len, splits.values()))) as progress, ThreadPoolExecutor(_num_threads()) as pool:
        for part, data in splits.items():
            looks[part] = []
            for start in range(0, len(data), 256):
                for look in pool.map(_Looker(data), range(start, min(start + 256, len(data)))):
                    looks[part].append(look)
                    problems += look.problems
                    progress.advance(1)
    statistics = {part: _statistics(data, looks[part]) for part, data in splits.items()}
    problems += _duplicates(splits, looks)
    if first.task == "segmentation":
        # While reading only some masks were asked.
        values = {value for found in looks.values() for look in found for value in look.nameless}
        sort = "value without a class"
        problems = [p for p in problems if p.kind != sort] + values_without_class(values, str(path))
    if first.task == "classification" and Path(path).is_dir() and not holds_shards(Path(path)):
        problems += _odd_files(Path(path))
    for part, data in splits.items() if first.task != "detection" else ():
        for name, count in statistics[part].images_of.items():
            if not count:
                problems.append(Problem(file=data.origin, kind="class without images", detail=name))
    return CheckReport(
        path=str(path),
        task=first.task,
        classes=first.classes,
        statistics=statistics,
        problems=tuple(dict.fromkeys(problems)),
        splits=splits,
    )


def contact_sheet(
    splits: Mapping[str, ImageSet[Any]], *, num_images: int = 24, columns: int = 6, cell: int = 320
) -> Image.Image:
    """Images evenly spaced over all parts, with their class, their boxes or the colors of their masks.

    Args:
        splits: as of `find_splits`.
        num_images: how many; images that cannot be read are passed over.
        columns: images in a row.
        cell: side of each in pixels.
    """
    everything = [(part, data, number) for part, data in splits.items() for number in range(len(data))]
    places = np.linspace(0, len(everything) - 1, min(num_images, len(everything))).round().astype(int).tolist()
    images, captions = [], []
    shown: set[int] = set()
    for part, data, number in (everything[place] for place in places):
        try:
            image, labels = _drawn(data, number, cell)
        except ImageError:
            continue
        images.append(image)
        shown |= labels
        lines = [f"{part}: {Path(data.names[number]).name}"]
        captions.append(
            [*lines, *(data.classes[label] for label in labels)] if data.task == "classification" else lines
        )
    sheet = drawing.contact_sheet(images, captions, [drawing.DARK] * len(images), columns=columns, cell=cell)
    first = next(iter(splits.values()))
    if first.task == "classification" or _named_at_boxes(first):
        return sheet
    colors = drawing.class_colors(len(first.classes))
    return drawing.with_legend(sheet, [(first.classes[label], colors[label]) for label in sorted(shown)])


def _named_at_boxes(data: ImageSet[Any]) -> bool:
    """Many classes are hard to tell by color alone; few are easier on the eye without a word at each box."""
    return data.task == "detection" and len(data.classes) > _LEGEND_CLASSES


def _drawn(data: ImageSet[Any], number: int, cell: int) -> tuple[Image.Image, set[int]]:
    """An image with what is known of it, small, and which classes it shows."""
    image, target = read_image(data.open(number), data.names[number]), data.targets[number]
    scale = cell / max(image.size)
    small = drawing.fit(image, cell)
    if isinstance(target, Boxes):
        counted = ~target.crowd
        labels = target.labels[counted].tolist()
        colors = drawing.class_colors(len(data.classes))
        texts = [data.classes[label] if _named_at_boxes(data) else "" for label in labels]
        small = drawing.draw_outlines(small, target.xyxy[target.crowd] * scale)
        boxes = target.xyxy[counted] * scale
        return drawing.draw_boxes(small, boxes, texts, [colors[label] for label in labels]), set(labels)
    if isinstance(target, Mask):
        label_map = np.asarray(Image.fromarray(target.read()).resize(small.size, Image.Resampling.NEAREST))
        labels = set(np.unique(label_map).tolist()) - {IGNORE}
        return drawing.draw_label_map(small, label_map, data.classes, legend=False), labels
    return small, {target}


# -- looking at each image ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Look:
    """What opening an image, and its mask, showed."""

    digest: bytes = b""
    size: tuple[int, int] | None = None
    pixels: NDArray[np.int64] | None = None
    """Of each class, and of `IGNORE`."""
    nameless: list[int] = field(default_factory=list)
    """Values of the mask that no class stands for."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Looker:
    data: ImageSet[Any]

    def __call__(self, number: int) -> _Look:
        look, file = _Look(), _file_of(self.data, number)
        try:
            source = self.data.open(number)
            if isinstance(source, str | os.PathLike):
                source = Path(source).read_bytes()
            if isinstance(source, bytes):
                look.digest = hashlib.sha256(source).digest()
            look.size = read_image(source, file).size
        except (ImageError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
            remedy = "training leaves it out; remove or replace it"
            look.problems.append(Problem(file=file, kind="image that cannot be read", detail=reason, remedy=remedy))
        target = self.data.targets[number]
        if isinstance(target, Mask):
            _look_at_mask(target, look)
        elif self.data.sizes is not None and look.size and self.data.sizes[number] != look.size:
            look.problems.append(size_problem(file, self.data.sizes[number], look.size))
        return look


def _look_at_mask(mask: Mask, look: _Look) -> None:
    try:
        values = read_label_map(mask.path)
    except ImageError as error:
        look.problems.append(unusable_mask(mask.path, error))
        return
    size = (values.shape[1], values.shape[0])
    if look.size and size != look.size:
        turned = size == look.size[::-1]
        remedy = "the image has been turned (EXIF) since; turn the mask" if turned else "save it in the image's size"
        sizes = f"{size[0]} x {size[1]}, the image {look.size[0]} x {look.size[1]}"
        look.problems.append(
            Problem(file=str(mask.path), kind="mask of another size than its image", detail=sizes, remedy=remedy)
        )
    counts = np.bincount(values.ravel(), minlength=256)
    class_of = np.frombuffer(mask.class_of, np.uint8)
    look.pixels = np.zeros(256, np.int64)
    np.add.at(look.pixels, class_of, counts)
    look.nameless = np.flatnonzero((counts > 0) & (class_of == IGNORE))[:256].tolist()


def _file_of(data: ImageSet[Any], number: int) -> str:
    source = data.open(number)
    return os.fspath(source) if isinstance(source, str | Path) else f"{data.origin}, {data.names[number]}"


def _num_threads() -> int:
    return min(8, available_cores())


# -- putting it together ----------------------------------------------------------------------------------------------


def _statistics(data: ImageSet[Any], looks: Sequence[_Look]) -> SplitStatistics:
    sizes = sorted((look.size for look in looks if look.size), key=lambda size: size[0] * size[1]) or [(0, 0)]
    num_classes = len(data.classes)
    images = np.zeros(num_classes, np.int64)
    pixels = np.zeros(256, np.int64)
    areas = [np.zeros(0, np.float32)]
    crowds = without = 0
    for target, look in zip(data.targets, looks, strict=True):
        if isinstance(target, Boxes):
            counted = ~target.crowd
            images[np.unique(target.labels[counted])] += 1
            areas.append(target.areas[counted])
            crowds += int(target.crowd.sum())
            without += not target.labels.size
        elif not isinstance(target, Mask):
            images[target] += 1
        elif look.pixels is not None:
            images += look.pixels[:num_classes] > 0
            pixels += look.pixels
    common: dict[str, Any] = {
        "images": len(data),
        "readable": sum(look.size is not None for look in looks),
        "smallest": sizes[0],
        "largest": sizes[-1],
        "images_of": dict(zip(data.classes, images.tolist(), strict=True)),
    }
    if data.task == "detection":
        area = np.concatenate(areas)
        small, large = int((area < _SMALL).sum()), int((area >= _LARGE).sum())
        return SplitStatistics(
            **common,
            objects_of=dict(zip(data.classes, data.class_counts(), strict=True)),
            box_sizes={"small": small, "medium": len(area) - small - large, "large": large},
            crowds=crowds,
            without_objects=without,
        )
    if data.task == "segmentation":
        shares = pixels[:num_classes] / max(1, int(pixels[:num_classes].sum()))
        return SplitStatistics(
            **common,
            pixels_of=dict(zip(data.classes, shares.tolist(), strict=True)),
            void=float(pixels[IGNORE] / max(1, int(pixels.sum()))),
        )
    return SplitStatistics(**common)


def _duplicates(splits: Mapping[str, ImageSet[Any]], looks: Mapping[str, Sequence[_Look]]) -> list[Problem]:
    """Files with the same content; the worst are those in two parts, for they make results look too good."""
    first: dict[bytes, tuple[str, int]] = {}
    problems = []
    for part, data in splits.items():
        for number, look in enumerate(looks[part]):
            if not look.digest:
                continue
            other_part, other = first.setdefault(look.digest, (part, number))
            if (other_part, other) == (part, number):
                continue
            where = _file_of(splits[other_part], other)
            kind, remedy = "same image twice", "remove one of them"
            if other_part != part:
                kind = "same image in two parts"
                remedy = f"remove one of them, or what is measured on {part} will be too good"
            elif data.task == "classification" and data.targets[number] != data.targets[other]:
                kind, remedy = "same image in two classes", "keep the one that is right"
            detail = f"also in {other_part}: {where}" if other_part != part else f"also {where}"
            problems.append(Problem(file=_file_of(data, number), kind=kind, detail=detail, remedy=remedy))
    return problems


def _odd_files(path: Path) -> list[Problem]:
    """Files in the folders of the classes that no name of theirs makes images."""
    found = []
    for parent, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(parent) != path:
            found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    odd = [str(file) for file in found if file.suffix.lower() not in IMAGE_SUFFIXES]
    return [Problem(file=file, kind="file of no known kind of image", remedy="passed over") for file in odd]
