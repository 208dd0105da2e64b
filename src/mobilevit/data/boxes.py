"""Boxes as they stand in files of any format: checked, and made into an `ImageSet`. The formats are modules beside."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.data.imageset import Boxes, ImageSet, Problem
from mobilevit.errors import MobileViTError
from mobilevit.imaging.decode import IMAGE_SUFFIXES

IMAGE_FOLDERS = ("jpegimages", "images", "imgs", "img", "image", "pictures")
"""What folders of images are called, in small letters."""

_ROUNDING = 1.0  # pixels that a box may pass the border by without a word


@dataclass(kw_only=True)
class BoxTable:
    """Images and boxes of one part as they stand in the files; `image_set` makes sense of them."""

    root: Path
    """What the names of the images are relative to."""
    origin: str
    """Where the part comes from, for messages."""
    word: str
    """What a mark counts, for messages: "line", "object", "annotation"."""
    images: list[Path] = field(default_factory=list)
    """Their paths."""
    files: list[str] = field(default_factory=list)
    """Of each image: where its boxes stand."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Of each image: (width, height)."""
    owners: list[int] = field(default_factory=list)
    """Of each box, like all below: number of its image."""
    marks: list[int] = field(default_factory=list)
    """Number or id in the file."""
    labels: list[Hashable] = field(default_factory=list)
    """The class, as the file has it."""
    xyxy: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Corners in pixels."""
    crowd: list[bool] = field(default_factory=list)
    """As in `Boxes`."""
    areas: list[float] = field(default_factory=list)
    """NaN where the file says nothing."""
    problems: list[Problem] = field(default_factory=list)
    """What was wrong so far."""

    def add_image(self, image: Path, file: str | Path, size: tuple[int, int]) -> int:
        """Returns the number of the image."""
        self.images.append(image)
        self.files.append(str(file))
        self.sizes.append(size)
        return len(self.images) - 1

    def add_box(
        self,
        owner: int,
        mark: int,
        label: Hashable,
        xyxy: tuple[float, float, float, float],
        crowd: bool = False,
        area: float = float("nan"),
    ) -> None:
        """A box of the image with the number `owner`; nothing is checked yet."""
        self.owners.append(owner)
        self.marks.append(mark)
        self.labels.append(label)
        self.xyxy.append(xyxy)
        self.crowd.append(crowd)
        self.areas.append(area)

    def report(self, file: str | Path, kind: str, detail: str = "", remedy: str = "") -> None:
        """Note a `Problem`."""
        self.problems.append(Problem(file=str(file), kind=kind, detail=detail, remedy=remedy))

    def report_unreadable(self, image: Path, error: OSError) -> None:
        """Note why `image_size` refused an image, which is left out."""
        reason = (error.strerror or str(error)).replace(f"{image}: ", "").replace(f" {str(image)!r}", "")
        self.report(image, "image that cannot be read", reason, "left out")

    def image_set(self, classes: tuple[str, ...], index_of: Mapping[Hashable, int], known: str) -> ImageSet[Boxes]:
        """Check every box against its image and put the usable ones into `Boxes`.

        Args:
            classes: names.
            index_of: from what stands in the files to the index of a class.
            known: where the classes are listed, for messages.

        Raises:
            ValueError: no image.
        """
        if not self.images:
            why = f" ({self.problems[0]})" if self.problems else ""
            raise MobileViTError(f"{self.origin}: no image of it can be used{why}; are the images where they belong?")
        labels = np.asarray([index_of.get(label, -1) for label in self.labels], np.int64)
        xyxy, usable = self._check(labels >= 0, known)
        targets = self._targets(xyxy, labels, usable)
        counted = labels[usable & ~np.asarray(self.crowd, np.bool_)]
        for name, count in zip(classes, np.bincount(counted, minlength=len(classes)).tolist(), strict=True):
            if not count:
                self.report(self.origin, "class without objects", name, "it cannot be learned or measured here")
        return ImageSet(
            task="detection",
            origin=self.origin,
            names=[relative(image, self.root) for image in self.images],
            targets=targets,
            classes=classes,
            open=self.images.__getitem__,
            problems=tuple(self.problems),
            sizes=self.sizes,
        )

    def _check(self, has_class: NDArray[np.bool_], known: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The boxes put in order and cut at the border, and which can be used; each box is refused for one reason."""
        self._report_boxes(
            ~has_class, "label without a class", f"left out; add it to {known} or correct it", label_alone=True
        )
        raw = np.asarray(self.xyxy, np.float32).reshape(-1, 4)
        ordered = np.concatenate([np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], axis=1)
        sizes = np.asarray(self.sizes, np.float32)[np.asarray(self.owners, np.int64)]
        clipped = np.clip(ordered, 0, np.tile(sizes, 2))
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            beyond = (np.abs(clipped - ordered) > _ROUNDING).any(axis=1)
        usable = has_class
        for passed, kind in (
            (np.isfinite(raw).all(axis=1), "coordinates that are no numbers"),
            ((ordered[:, 2:] > ordered[:, :2]).all(axis=1), "box without area"),
            ((clipped[:, 2:] > clipped[:, :2]).all(axis=1), "box outside the image"),
        ):
            self._report_boxes(usable & ~passed, kind, "left out")
            usable = usable & passed
        self._report_boxes(usable & beyond, "box partly outside the image", "clipped")
        self._report_boxes(usable & (ordered != raw).any(axis=1), "corners in the wrong order", "put in order")
        return clipped, usable

    def _report_boxes(self, which: NDArray[np.bool_], kind: str, remedy: str, *, label_alone: bool = False) -> None:
        for box in np.flatnonzero(which).tolist():
            owner = self.owners[box]
            width, height = self.sizes[owner]
            corners = " ".join(f"{value:.6g}" for value in self.xyxy[box])
            detail = f"{self.labels[box]}" if label_alone else f"{corners} in {width} x {height}"
            self.report(f"{self.files[owner]}, {self.word} {self.marks[box]}", kind, detail, remedy)

    def _targets(self, xyxy: NDArray[np.float32], labels: NDArray[np.int64], usable: NDArray[np.bool_]) -> list[Boxes]:
        """The usable boxes of each image, in the order of the file."""
        owners = np.asarray(self.owners, np.int64)
        kept = np.flatnonzero(usable)
        kept = kept[np.argsort(owners[kept], kind="stable")]
        xyxy, labels, crowd = xyxy[kept], labels[kept], np.asarray(self.crowd, np.bool_)[kept]
        stated = np.asarray(self.areas, np.float32)[kept]
        sides = xyxy[:, 2:] - xyxy[:, :2]
        areas = np.where(stated > 0, stated, sides[:, 0] * sides[:, 1])
        ends = np.bincount(owners[kept], minlength=len(self.images)).cumsum().tolist()
        return [
            Boxes(xyxy=xyxy[a:b], labels=labels[a:b], crowd=crowd[a:b], areas=areas[a:b])
            for a, b in zip([0, *ends], ends, strict=False)
        ]


def size_problem(file: str, stated: tuple[int, int], actual: tuple[int, int]) -> Problem:
    """What to say where an annotation was made on an image of another size."""
    remedy = "boxes taken as they are; look at them"
    if stated == actual[::-1]:
        remedy = "boxes taken as they are, though the image seems to have been turned (EXIF) since; draw them again"
    return Problem(
        file=file,
        kind="annotation of another size than its image",
        detail=f"{stated[0]} x {stated[1]}, the image {actual[0]} x {actual[1]}",
        remedy=remedy,
    )


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the head of the file.

    Raises:
        OSError: missing, or not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read_image` decides on those
            with Image.open(path) as image:
                if image.format == "TIFF":  # turned on loading, and in some versions of Pillow the size before that
                    image.load()
                    return image.size
                # Not the PNG reader's own method, which decodes the image in search of a tag behind it.
                turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
    except OSError:
        raise
    except Exception as error:  # readers raise SyntaxError, ValueError, struct.error and more on bad files
        raise OSError(f"{path}: {error}") from error


def index_classes(pairs: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], dict[Hashable, int]]:
    """Names in order, and the index of each key; keys with the same name share an index."""
    names: dict[str, int] = {}
    index_of = {key: names.setdefault(name, len(names)) for key, name in pairs}
    return tuple(names), index_of


def read_class_names(file: Path) -> list[str]:
    """A name a line; lines at the end may be empty.

    Raises:
        ValueError: no name, or an empty line among them.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        where = f", line {lines.index('') + 1}" if lines else ""
        raise MobileViTError(f"{file}{where}: no class name; write one a line")
    return lines


# -- files and folders ------------------------------------------------------------------------------------------------


class Listing:
    """Which files exist; each folder is listed once, which is much quicker than to ask for every file."""

    def __init__(self) -> None:
        self._folders: dict[Path, frozenset[str]] = {}

    def __contains__(self, path: Path) -> bool:
        return path.name in self.names(path.parent)

    def names(self, folder: Path) -> frozenset[str]:
        """What lies in a folder; nothing in one that does not exist."""
        if folder not in self._folders:
            try:
                self._folders[folder] = frozenset(entry.name for entry in os.scandir(folder))
            except OSError:
                self._folders[folder] = frozenset()
        return self._folders[folder]


def stem(name: str) -> str:
    """A name without the suffix of an image or annotation; "scene.2" has none."""
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in {*IMAGE_SUFFIXES, ".xml"} else name


def relative(path: Path, root: Path) -> str:
    """As seen from `root` where it lies below."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def sub_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the sub-folders called so; "Images" is as good as "images"."""
    if not folder.is_dir():
        return None
    folders = {entry.name.lower(): Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def has_file(folder: Path | None, suffix: str, but: Sequence[str] = ()) -> bool:
    """Whether a file with the suffix lies in the folder or below, other than those called as in `but`."""
    if folder is None:
        return False
    return any(name.lower().endswith(suffix) and name not in but for _, _, names in os.walk(folder) for name in names)
