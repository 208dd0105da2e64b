"""Check labeled data before training: count what is in them, and find what is wrong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import TaskName
from mobilevit.class_names import IGNORE
from mobilevit.data.boxes import size_problem
from mobilevit.data.datasets import find_splits
from mobilevit.data.imageset import AnyImages, ImageSet, Problem, in_threads
from mobilevit.data.mask_layouts import VALUE_WITHOUT_CLASS, unusable_mask, values_without_class
from mobilevit.errors import ImageError
from mobilevit.files import Json
from mobilevit.imaging import drawing
from mobilevit.imaging.decode import IMAGE_SUFFIXES, read_image
from mobilevit.progress import Progress
from mobilevit.tasks import get_task
from mobilevit.tasks.classification import CLASSIFICATION
from mobilevit.tasks.targets import Boxes, Mask, read_label_map

_SHOWN_PROBLEMS = 10
_SHOWN_CLASSES = 40
_SMALL, _LARGE = 32**2, 96**2  # pixels; COCO's limits between small, medium and large


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Statistics of one part of the data."""

    images: int
    readable: int
    """Images that could be decoded."""
    smallest: tuple[int, int]
    """(width, height) of the image with the fewest pixels; (0, 0) if none is readable."""
    largest: tuple[int, int]
    images_of: dict[str, int] = field(default_factory=dict)
    """For each class: images that show it."""
    objects_of: dict[str, int] = field(default_factory=dict)
    """Detection, for each class: boxes, without crowds."""
    pixels_of: dict[str, float] = field(default_factory=dict)
    """Segmentation, for each class: its share of the pixels that have one."""
    void: float = 0.0
    """Segmentation: share of all pixels that have no class."""
    without_objects: int = 0
    """Detection: images without any."""
    crowds: int = 0
    """Detection: boxes that are neither trained on nor counted."""
    box_sizes: dict[str, int] = field(default_factory=dict)
    """Detection: boxes by area, small below 32 x 32 pixels and large from 96 x 96."""

    def __str__(self) -> str:
        words = [f"{self.images:,} images"]
        if self.readable < self.images:
            words.append(f"{self.images - self.readable:,} of them unreadable")
        small, large = (f"{width} x {height}" for width, height in (self.smallest, self.largest))
        words.append(small if small == large else f"{small} to {large}")
        if self.box_sizes:
            sizes = ", ".join(f"{count:,} {size}" for size, count in self.box_sizes.items())
            words.append(f"{sum(self.objects_of.values()):,} objects ({sizes})")
            words.append(f"{self.without_objects:,} images without any")
        if self.crowds:
            words.append(f"{self.crowds:,} crowds, not counted")
        if self.pixels_of:
            words.append(f"{self.void:.2%} of the pixels void")
        return ", ".join(words)

    def cell(self, name: str) -> str:
        """Return the table's cell of a class."""
        images = f"{self.images_of[name]:,}"
        if self.objects_of:
            return f"{self.objects_of[name]:,} ({images})"
        return f"{self.pixels_of[name]:.2%} ({images})" if self.pixels_of else images


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The result of `check`."""

    path: str
    task: TaskName
    """The task that the data are labeled for."""
    classes: tuple[str, ...]
    statistics: dict[str, SplitStatistics]
    """By part: "train", "val", "test", or "all"."""
    problems: tuple[Problem, ...]
    splits: dict[str, AnyImages] = field(repr=False)
    """The data themselves, for `contact_sheet`."""

    def by_kind(self) -> dict[str, list[Problem]]:
        """Group the problems by kind; the rarest kinds come first."""
        groups: dict[str, list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault(problem.kind, []).append(problem)
        return dict(sorted(groups.items(), key=lambda item: len(item[1])))

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        return {
            "path": self.path,
            "task": self.task,
            "classes": list(self.classes),
            "splits": {part: asdict(statistics) for part, statistics in self.statistics.items()},
            "problem_counts": {kind: len(problems) for kind, problems in self.by_kind().items()},
            "problems": [asdict(problem) for problem in self.problems],
        }

    def headline(self) -> list[str]:
        """Return the lines above the table: the data, and a line for each part."""
        images = sum(part.images for part in self.statistics.values())
        lines = [f"{self.path}: {self.task}, {len(self.classes)} classes, {images:,} images"]
        return lines + [f"  {part}: {statistics}" for part, statistics in self.statistics.items()]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return heading and rows of the table of the classes."""
        shown = self.classes[:_SHOWN_CLASSES]
        rows = [[name, *(part.cell(name) for part in self.statistics.values())] for name in shown]
        if len(self.classes) > len(shown):
            rows.append([f"and {len(self.classes) - len(shown)} more classes", *[""] * len(self.statistics)])
        return [f"class, {get_task(self.task).counted}", *self.statistics], rows

    def problem_lines(self) -> list[str]:
        """Return the lines below the table: the problems by kind, the first ten of each."""
        if not self.problems:
            return ["no problems found"]
        lines = [f"{len(self.problems):,} {'problem' if len(self.problems) == 1 else 'problems'}"]
        for kind, problems in self.by_kind().items():
            lines.append(f"  {kind}: {len(problems):,}")
            for problem in problems[:_SHOWN_PROBLEMS]:
                what = "; ".join(text for text in (problem.detail, problem.remedy) if text)
                lines.append(f"    {problem.file}: {what}" if what else f"    {problem.file}")
            if len(problems) > _SHOWN_PROBLEMS:
                lines.append(f"    and {len(problems) - _SHOWN_PROBLEMS:,} more")
        return lines


def check(path: str | os.PathLike[str], task: TaskName | None = None) -> CheckReport:
    """Read the annotations and open every image and mask; arguments and errors are those of `find_splits`."""
    splits = find_splits(path, task)
    first = next(iter(splits.values()))
    problems = [problem for data in splits.values() for problem in data.problems]
    looks: dict[str, list[_Look]] = {part: [] for part in splits}
    with Progress("check", sum(map(len, splits.values()))) as progress:
        for part, data in splits.items():
            for look in in_threads(partial(_look_at, data), range(len(data))):
                looks[part].append(look)
                problems += look.problems
                progress.advance(1)
    statistics = {part: _statistics(data, looks[part]) for part, data in splits.items()}
    problems += _duplicates(splits, looks)
    # Reading the layout looks into some of the masks only.
    values = {value for found in looks.values() for look in found for value in look.nameless}
    problems = [p for p in problems if p.kind != VALUE_WITHOUT_CLASS] + values_without_class(values, str(path))
    if first.task is CLASSIFICATION and first.shards is None:
        problems += _odd_files(Path(path))
    for part, data in splits.items():
        if not statistics[part].objects_of:  # with boxes, reading them reports it
            unseen = [name for name, count in statistics[part].images_of.items() if not count]
            problems += [Problem(data.origin, "class without images", name) for name in unseen]
    return CheckReport(
        path=str(path),
        task=first.task.name,
        classes=first.classes,
        statistics=statistics,
        problems=tuple(dict.fromkeys(problems)),
        splits=splits,
    )


# -- looking at each image --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Look:
    """The result of opening an image, and its mask."""

    digest: bytes = b""
    size: tuple[int, int] | None = None
    pixels: NDArray[np.int64] | None = None
    """For each class and `IGNORE`."""
    nameless: list[int] = field(default_factory=list)
    """Values of the mask that no class stands for."""
    problems: list[Problem] = field(default_factory=list)


def _look_at(data: AnyImages, number: int) -> _Look:
    look, file = _Look(), _file_of(data, number)
    try:
        source = data.open(number)
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        if isinstance(source, bytes):
            look.digest = hashlib.sha256(source).digest()
        look.size = read_image(source, file).size
    except (ImageError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
        remedy = "training leaves it out; remove or replace it"
        look.problems.append(Problem(file, "image that cannot be read", reason, remedy))
    if data.sizes is not None and look.size and data.sizes[number] != look.size:
        look.problems.append(size_problem(file, data.sizes[number], look.size))
    if isinstance(data.targets[number], Mask):
        _look_at_mask(data.targets[number], look)
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
        look.problems.append(Problem(str(mask.path), "mask of another size than its image", sizes, remedy))
    counts = np.bincount(values.ravel(), minlength=256)
    class_of = np.frombuffer(mask.class_of, np.uint8)
    look.pixels = np.bincount(class_of, weights=counts, minlength=256).astype(np.int64)
    look.nameless = np.flatnonzero((counts > 0) & (class_of == IGNORE)).tolist()


def _file_of(data: AnyImages, number: int) -> str:
    source = data.open(number)
    return os.fspath(source) if isinstance(source, str | Path) else f"{data.origin}, {data.names[number]}"


# -- the data as a whole ----------------------------------------------------------------------------------------------


def _duplicates(splits: Mapping[str, AnyImages], looks: Mapping[str, Sequence[_Look]]) -> list[Problem]:
    """Find files with the same content; the worst are those in two parts, which make results look too good."""
    first: dict[bytes, tuple[str, int]] = {}
    problems = []
    for part, data in splits.items():
        for number, look in enumerate(looks[part]):
            other_part, other = first.setdefault(look.digest, (part, number))
            if not look.digest or (other_part, other) == (part, number):
                continue
            where = _file_of(splits[other_part], other)
            kind, remedy, detail = "same image twice", "remove one of them", f"also {where}"
            if other_part != part:
                kind, detail = "same image in two parts", f"also in {other_part}: {where}"
                remedy = f"remove one of them, or what is measured on {part} will be too good"
            elif _caption(data, number) != _caption(data, other):
                kind, remedy = "same image in two classes", "keep the one that is right"
            problems.append(Problem(_file_of(data, number), kind, detail, remedy))
    return problems


def _odd_files(path: Path) -> list[Problem]:
    """Find files in the folders of the classes whose names are not those of images."""
    odd = (file for file in sorted(path.glob("*/**/*")) if file.suffix.lower() not in IMAGE_SUFFIXES and file.is_file())
    visible = [file for file in odd if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    return [Problem(str(file), "file of no known kind of image", remedy="passed over") for file in visible]


def _statistics(data: AnyImages, looks: Sequence[_Look]) -> SplitStatistics:
    sizes = sorted((look.size for look in looks if look.size), key=lambda size: size[0] * size[1])
    smallest, largest = (sizes[0], sizes[-1]) if sizes else ((0, 0), (0, 0))
    images_of = dict(zip(data.classes, data.class_counts(), strict=True))
    statistics = SplitStatistics(
        images=len(looks), readable=len(sizes), smallest=smallest, largest=largest, images_of=images_of
    )
    count = _COUNTS.get(data.task.name)
    return count(data, looks, statistics) if count else statistics


def _count_boxes(data: ImageSet[Boxes], _: Sequence[_Look], so_far: SplitStatistics) -> SplitStatistics:
    images = np.zeros(len(data.classes), np.int64)
    for target in data.targets:
        images[np.unique(target.labels[~target.crowd])] += 1
    area = np.concatenate([target.areas[~target.crowd] for target in data.targets])
    small, large = int((area < _SMALL).sum()), int((area >= _LARGE).sum())
    return replace(
        so_far,
        images_of=dict(zip(data.classes, images.tolist(), strict=True)),
        objects_of=dict(zip(data.classes, data.class_counts(), strict=True)),
        box_sizes={"small": small, "medium": len(area) - small - large, "large": large},
        crowds=sum(int(target.crowd.sum()) for target in data.targets),
        without_objects=sum(not target.labels.size for target in data.targets),
    )


def _count_pixels(data: ImageSet[Mask], looks: Sequence[_Look], so_far: SplitStatistics) -> SplitStatistics:
    pixels = np.array([look.pixels for look in looks if look.pixels is not None], np.int64).reshape(-1, 256)
    total = pixels.sum(axis=0)
    of_classes = total[: len(data.classes)]
    images = (pixels[:, : len(data.classes)] > 0).sum(axis=0)
    return replace(
        so_far,
        images_of=dict(zip(data.classes, images.tolist(), strict=True)),
        pixels_of=dict(zip(data.classes, (of_classes / max(1, int(of_classes.sum()))).tolist(), strict=True)),
        void=float(total[IGNORE] / max(1, int(total.sum()))),
    )


# Where an image has more than its class.
_COUNTS: dict[TaskName, Callable[[AnyImages, Sequence[_Look], SplitStatistics], SplitStatistics]] = {
    "detection": _count_boxes,
    "segmentation": _count_pixels,
}


# -- the sheet --------------------------------------------------------------------------------------------------------


def contact_sheet(
    splits: Mapping[str, AnyImages], *, num_images: int = 24, columns: int = 6, cell: int = 320
) -> Image.Image:
    """Draw images evenly spaced over all parts, with their class, their boxes or the colors of their masks.

    Images that cannot be read are passed over. `cell` is the side of each in pixels.
    """
    everything = [(part, data, number) for part, data in splits.items() for number in range(len(data))]
    places = np.linspace(0, len(everything) - 1, min(num_images, len(everything))).round().astype(int).tolist()
    images, captions = [], []
    shown: set[int] = set()
    for part, data, number in (everything[place] for place in places):
        try:
            image = read_image(data.open(number), data.names[number])
            small = drawing.fit(image, cell)
            drawn, labels = data.task.draw_target(data.targets[number], small, small.width / image.width, data.classes)
        except ImageError:
            continue
        images.append(drawn)
        shown |= labels
        captions.append([f"{part}: {Path(data.names[number]).name}", *_caption(data, number)])
    sheet = drawing.contact_sheet(images, captions, [drawing.DARK] * len(images), columns=columns, cell=cell)
    first = next(iter(splits.values()))
    if len(first.classes) > first.task.most_in_legend:
        return sheet
    return drawing.with_legend(sheet, {label: first.classes[label] for label in sorted(shown)}, len(first.classes))


def _caption(data: AnyImages, number: int) -> list[str]:
    return data.task.caption(data.targets[number], data.classes)
