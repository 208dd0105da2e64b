"""An `ImageSet`: images opened by number, and a target for each, whatever the task."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import TaskName
from mobilevit.class_names import IGNORE
from mobilevit.data.folders import some
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import Source


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The objects of one image, perhaps none."""

    xyxy: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels of the upright image."""
    labels: NDArray[np.int64]
    """(N,): index into the classes."""
    crowd: NDArray[np.bool_]
    """(N,): objects that are neither trained on nor counted (COCO's crowds, VOC's difficult objects)."""
    areas: NDArray[np.float32]
    """(N,): pixels of the object itself if the data say so, else of its box."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A label map in a file: a gray or palette image whose values are class numbers."""

    path: Path
    class_of: bytes
    """256 entries: for each value in the file the class index, or `IGNORE`."""

    def read(self) -> NDArray[np.uint8]:
        """Read the class indices, or `IGNORE`, of all pixels. Shape: uint8 (H, W).

        Raises:
            ImageError: see `read_label_map`.
        """
        return np.frombuffer(self.class_of, np.uint8)[read_label_map(self.path)]


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """Read the values of a mask file. Shape: uint8 (H, W).

    Raises:
        ImageError: missing, unreadable, in color, or with values above 255.
    """
    try:
        with Image.open(path, formats=("PNG", "BMP", "TIFF", "GIF")) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise ImageError(
                    f"{path}: a mask in {image.mode}; save it as a gray or palette PNG whose values are class numbers"
                )
            values = np.asarray(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such mask") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise ImageError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from error
    if values.dtype != np.bool_ and values.max(initial=0) > 255:
        raise ImageError(f"{path}: has the value {values.max()}; class numbers end at 255")
    return values.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong in the data, and what was done about it or is to be done."""

    file: str
    """The file, perhaps with a line or an id."""
    kind: str
    """The kind of problem in a few words, such as "box without area"; problems are counted by it."""
    detail: str = ""
    """The offending values."""
    remedy: str = ""
    """The repair that was made, or is to be made."""

    def __str__(self) -> str:
        what = f"{self.kind} ({self.detail})" if self.detail else self.kind
        return f"{self.file}: {what}" + (f"; {self.remedy}" if self.remedy else "")


Target = TypeVar("Target", int, Boxes, Mask)


@dataclass(frozen=True, kw_only=True)
class ImageSet(Generic[Target]):
    """Images that are opened by number, and a target for each."""

    task: TaskName
    """Decides what the targets are."""
    origin: str
    """Where the images come from, for messages."""
    names: Sequence[str]
    """A name for each image: a path relative to the origin, or a row."""
    targets: Sequence[Target]
    """For each image: its index into `classes`, its `Boxes` or its `Mask`."""
    classes: tuple[str, ...]
    """Class names."""
    open: Callable[[int], Source]
    """From the number of an image to what `read_image` takes; can be pickled for processes that are not forked."""
    problems: tuple[Problem, ...] = field(default=(), repr=False)
    """Problems found in the annotations."""
    sizes: Sequence[tuple[int, int]] | None = field(default=None, repr=False)
    """(width, height) of each image, if the annotations say it."""
    shards: Sequence[range] | None = field(default=None, repr=False)
    """Ranges of images that lie in one file, which samplers keep together; every image is in one of them."""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Sequence[int]) -> ImageSet[Target]:
        """Return the images at `indices`, in that order."""
        return replace(
            self,
            names=[self.names[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            open=partial(_open_at, self.open, indices),
            sizes=None if self.sizes is None else [self.sizes[i] for i in indices],
            shards=None,
        )

    def fingerprint(self) -> str:
        """Hash names and targets: equal for equal data, wherever they lie and in whichever order."""
        pairs = zip(self.names, self.targets, strict=True)
        lines = sorted(f"{self._described(target)}\t{name}" for name, target in pairs)
        # File names need not be UTF-8; Python keeps their other bytes as surrogates.
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]

    def _described(self, target: Target) -> str:
        if isinstance(target, Boxes):
            rows = zip(target.labels.tolist(), target.xyxy.tolist(), target.crowd.tolist(), strict=True)
            return repr([(self.classes[label], box, crowd) for label, box, crowd in rows])
        if isinstance(target, Mask):
            return f"{target.path.name} {self.classes} {target.class_of.hex()}"
        return self.classes[target]

    def class_counts(self) -> list[int]:
        """Count the images (classification) or objects (detection) of each class; masks are not opened for this."""
        counts: Counter[int] = Counter()
        for target in self.targets:
            if isinstance(target, Boxes):
                counts.update(target.labels[~target.crowd].tolist())
            elif not isinstance(target, Mask):
                counts[target] += 1
        return [counts[index] for index in range(len(self.classes))]

    def relabel(self, classes: tuple[str, ...]) -> ImageSet[Target]:
        """Return the same images, labeled in the order of a model's `classes`.

        Raises:
            MobileViTError: a class that the model does not know.
        """
        if self.classes == classes:
            return self
        counts = self.class_counts()
        used = [self.task == "segmentation" or count > 0 for count in counts]
        unknown = [name for name, is_used in zip(self.classes, used, strict=True) if is_used and name not in classes]
        if unknown:
            raise MobileViTError(
                f"{self.origin}: the checkpoint does not know {some(unknown)}; its classes are {some(classes)}. "
                "Rename the classes of the data or choose another checkpoint"
            )
        new = np.array([classes.index(name) if name in classes else -1 for name in self.classes])
        targets: list[Any] = [_relabel(target, new) for target in self.targets]
        return replace(self, targets=targets, classes=classes)


def _relabel(target: int | Boxes | Mask, new: NDArray[np.int64]) -> int | Boxes | Mask:
    if isinstance(target, Boxes):
        # Without a class are crowds alone: `relabel` refuses other objects.
        known = new[target.labels] >= 0
        return Boxes(
            xyxy=target.xyxy[known],
            labels=new[target.labels][known],
            crowd=target.crowd[known],
            areas=target.areas[known],
        )
    if isinstance(target, Mask):
        return replace(target, class_of=bytes(v if v == IGNORE else int(new[v]) for v in target.class_of))
    return int(new[target])


def check_classes(data: ImageSet[Any]) -> None:
    """Refuse data that nothing can be learned from.

    Raises:
        MobileViTError: no image or object of some class, or too few classes.
    """
    if data.task == "segmentation":
        if len(data.classes) < 2:
            raise MobileViTError(f"{data.origin}: only one class ({data.classes[0]}); segmentation needs two or more")
        if len(data.classes) > IGNORE:
            raise MobileViTError(f"{data.origin}: {len(data.classes)} classes; masks of bytes have room for {IGNORE}")
        return
    what = "images" if data.task == "classification" else "objects"
    empty = [name for name, count in zip(data.classes, data.class_counts(), strict=True) if not count]
    if empty and (data.task == "classification" or len(empty) == len(data.classes)):
        raise MobileViTError(f"{data.origin}: no {what} of {some(empty)}; add some or remove the class")
    if data.task == "classification" and len(data.classes) < 2:
        raise MobileViTError(
            f"{data.origin}: only one class ({data.classes[0]}); a classifier needs two or more, one sub-folder each"
        )


def split(data: ImageSet[Target], *, val_fraction: float, seed: int) -> tuple[ImageSet[Target], ImageSet[Target]]:
    """Hold out `val_fraction` of the images, the same for the same names and seed.

    Classification holds out a share of every class, at least one image. Detection groups images by their rarest
    class, so that rare classes are in both parts. Segmentation takes any images.

    Raises:
        MobileViTError: a class, or the whole, has a single image.
    """
    train: list[int] = []
    val: list[int] = []
    for name, numbers in _strata(data):
        if len(numbers) < 2 and (data.task == "classification" or len(data) < 2):
            whose = f"class {name} has" if data.task == "classification" else "there is"
            raise MobileViTError(
                f"{data.origin}: {whose} only one image; two are needed, one to train on and "
                "one to validate on. Add images, or give `val_data`"
            )
        # Seeded by the class's name, so that adding a class leaves the others' division as it was.
        random.Random(f"{seed}/{name}").shuffle(numbers)
        count = min(max(1, round(len(numbers) * val_fraction)), len(numbers) - 1)
        val += numbers[:count]
        train += numbers[count:]
    return data.subset(sorted(train)), replace(data.subset(sorted(val)), problems=())  # reported once


def _strata(data: ImageSet[Any]) -> list[tuple[str, list[int]]]:
    """Group the numbers of the images, in order of their names, by class or rarest class."""
    counts = data.class_counts()
    groups: dict[int, list[int]] = {}
    for number in sorted(range(len(data)), key=lambda i: data.names[i]):
        target = data.targets[number]
        label = -1
        if isinstance(target, Boxes):
            label = min(target.labels[~target.crowd].tolist(), key=lambda i: (counts[i], i), default=-1)
        elif not isinstance(target, Mask):
            label = target
        groups.setdefault(label, []).append(number)
    return [("" if label < 0 else data.classes[label], numbers) for label, numbers in sorted(groups.items())]


def _open_at(opener: Callable[[int], Source], indices: Sequence[int], number: int) -> Source:
    return opener(indices[number])
