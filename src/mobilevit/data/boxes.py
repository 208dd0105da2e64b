"""Boxes as files of any format have them, checked and made into `ImageSet`s; each format has a module of its own."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.data.folders import as_splits, relative
from mobilevit.data.imageset import ImageSet, Problem
from mobilevit.errors import MobileViTError
from mobilevit.tasks.detection import DETECTION
from mobilevit.tasks.targets import Boxes

_ROUNDING = 1.0
"""Pixels by which a box may pass the border without a problem being reported."""


class Box(NamedTuple):
    """A box as a file has it."""

    owner: int
    """Number of its image."""
    mark: int
    """Its number or id in the file."""
    label: Hashable
    """Its class, as the file has it."""
    xyxy: tuple[float, float, float, float]
    """Corners in pixels."""
    crowd: bool = False
    area: float = float("nan")
    """NaN if the file does not say."""


@dataclass(kw_only=True)
class BoxTable:
    """Images and boxes of one part as they stand in the files; nothing is checked yet."""

    root: Path
    """The folder that the names of the images are relative to."""
    origin: str
    """Origin of the part, for messages."""
    word: str
    """The unit of `Box.mark`, for messages: "line", "object", "annotation"."""
    known: str
    """File that lists the classes, for messages."""
    images: list[Path] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """For each image: the file with its boxes."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """For each image: (width, height)."""
    boxes: list[Box] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add_image(self, image: Path, file: str | Path, size: tuple[int, int]) -> int:
        """Add an image and return its number."""
        self.images.append(image)
        self.files.append(str(file))
        self.sizes.append(size)
        return len(self.images) - 1

    def open_image(self, image: Path) -> tuple[int, int] | None:
        """Return (width, height) of the upright image; report one that cannot be read, and return None."""
        try:
            return image_size(image)
        except FileNotFoundError:
            self.report(image, "listed image that is missing", remedy="left out")
        except OSError as error:
            reason = (error.strerror or str(error)).replace(f"{image}: ", "").replace(f" {str(image)!r}", "")
            self.report(image, "image that cannot be read", reason, "left out")
        return None

    def report(self, file: str | Path, kind: str, detail: str = "", remedy: str = "") -> None:
        """Note a `Problem`."""
        self.problems.append(Problem(str(file), kind, detail, remedy))


def box_splits(
    tables: Mapping[str, BoxTable], classes: tuple[str, ...], index_of: Mapping[Hashable, int]
) -> dict[str, ImageSet[Boxes]]:
    """Check every box against its image and put the usable ones into `Boxes`, by part.

    `index_of` goes from labels in the files to indices of classes. A test part without a single box, as some data sets
    are handed out, is left out.
    """
    tables = dict(tables)
    if len(tables) > 1 and "test" in tables and not tables["test"].boxes:
        unlabeled = tables.pop("test")
        next(iter(tables.values())).report(unlabeled.origin, "test part without boxes", remedy="left out")
    return as_splits({part: _image_set(table, classes, index_of) for part, table in tables.items()})


def _image_set(table: BoxTable, classes: tuple[str, ...], index_of: Mapping[Hashable, int]) -> ImageSet[Boxes]:
    if not table.images:
        why = f" ({table.problems[0]})" if table.problems else ""
        raise MobileViTError(f"{table.origin}: no image of it can be used{why}; are the images where they belong?")
    labels = np.asarray([index_of.get(box.label, -1) for box in table.boxes], np.int64)
    xyxy, usable = _check(table, labels >= 0)
    counted = labels[usable & ~np.asarray([box.crowd for box in table.boxes], np.bool_)]
    for name, count in zip(classes, np.bincount(counted, minlength=len(classes)).tolist(), strict=True):
        if not count:
            table.report(table.origin, "class without objects", name, "it cannot be learned or measured here")
    return ImageSet(
        task=DETECTION,
        origin=table.origin,
        names=[relative(image, table.root) for image in table.images],
        targets=_targets(table, xyxy, labels, usable),
        classes=classes,
        open=table.images.__getitem__,
        problems=tuple(table.problems),
        sizes=table.sizes,
    )


def _check(table: BoxTable, has_class: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Put corners in order and cut boxes at the border, and say which are usable; each is refused for one reason."""
    raw = np.asarray([box.xyxy for box in table.boxes], np.float32).reshape(-1, 4)
    ordered = np.concatenate([np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], axis=1)
    sizes = np.asarray(table.sizes, np.float32)[np.asarray([box.owner for box in table.boxes], np.int64)]
    clipped = np.clip(ordered, 0, np.tile(sizes, 2))
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        beyond = (np.abs(clipped - ordered) > _ROUNDING).any(axis=1)

    def report(which: NDArray[np.bool_], kind: str, remedy: str, *, label_alone: bool = False) -> None:
        for box in (table.boxes[number] for number in np.flatnonzero(which).tolist()):
            width, height = table.sizes[box.owner]
            corners = " ".join(f"{value:.6g}" for value in box.xyxy)
            detail = f"{box.label}" if label_alone else f"{corners} in {width} x {height}"
            table.report(f"{table.files[box.owner]}, {table.word} {box.mark}", kind, detail, remedy)

    usable = has_class
    report(~usable, "label without a class", f"left out; add it to {table.known} or correct it", label_alone=True)
    for passed, kind in (
        (np.isfinite(raw).all(axis=1), "coordinates that are no numbers"),
        ((ordered[:, 2:] > ordered[:, :2]).all(axis=1), "box without area"),
        ((clipped[:, 2:] > clipped[:, :2]).all(axis=1), "box outside the image"),
    ):
        report(usable & ~passed, kind, "left out")
        usable = usable & passed
    report(usable & beyond, "box partly outside the image", "clipped")
    report(usable & (ordered != raw).any(axis=1), "corners in the wrong order", "put in order")
    return clipped, usable


def _targets(
    table: BoxTable, xyxy: NDArray[np.float32], labels: NDArray[np.int64], usable: NDArray[np.bool_]
) -> list[Boxes]:
    """Gather the usable boxes of each image, in the order of the file."""
    kept = sorted(np.flatnonzero(usable).tolist(), key=lambda number: table.boxes[number].owner)
    boxes = [table.boxes[number] for number in kept]
    crowd = np.asarray([box.crowd for box in boxes], np.bool_)
    stated = np.asarray([box.area for box in boxes], np.float32)
    xyxy, labels = xyxy[kept].reshape(-1, 4), labels[kept]
    sides = xyxy[:, 2:] - xyxy[:, :2]
    areas = np.where(stated > 0, stated, sides[:, 0] * sides[:, 1])
    owners = np.asarray([box.owner for box in boxes], np.int64)
    ends = np.bincount(owners, minlength=len(table.images)).cumsum().tolist()
    return [
        Boxes(xyxy=xyxy[a:b], labels=labels[a:b], crowd=crowd[a:b], areas=areas[a:b])
        for a, b in zip([0, *ends], ends, strict=False)
    ]


def size_problem(file: str, stated: tuple[int, int], actual: tuple[int, int]) -> Problem:
    """Describe an annotation that was made on an image of another size."""
    remedy = "boxes taken as they are; look at them"
    if stated == actual[::-1]:
        remedy = "boxes taken as they are, though the image seems to have been turned (EXIF) since; draw them again"
    detail = f"{stated[0]} x {stated[1]}, the image {actual[0]} x {actual[1]}"
    return Problem(file, "annotation of another size than its image", detail, remedy)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of the upright image, from the head of the file; `OSError` if it is none."""
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
