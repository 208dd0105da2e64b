"""Images with what is known of them, as one simple thing for all tasks: an `ImageSet`."""

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

from mobilevit.card import Task
from mobilevit.class_names import IGNORE
from mobilevit.data.folders import some
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import Source


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The objects of one image; none at all is fine."""

    xyxy: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels of the upright image."""
    labels: NDArray[np.int64]
    """(N,): index into the classes."""
    crowd: NDArray[np.bool_]
    """(N,): regions that are neither trained on nor counted (COCO's crowds, VOC's difficult objects)."""
    areas: NDArray[np.float32]
    """(N,): pixels of the object itself where the data say so, else of its box."""

    @classmethod
    def of(
        cls,
        xyxy: Sequence[Sequence[float]],
        labels: Sequence[int],
        crowd: Sequence[bool] | None = None,
        areas: Sequence[float] | None = None,
    ) -> Boxes:
        """From plain lists; without `areas`, those of the boxes."""
        boxes = np.asarray(xyxy, np.float32).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        return cls(
            xyxy=boxes,
            labels=np.asarray(labels, np.int64),
            crowd=np.zeros(len(boxes), np.bool_) if crowd is None else np.asarray(crowd, np.bool_),
            areas=sides[:, 0] * sides[:, 1] if areas is None else np.asarray(areas, np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A label map in a file: a gray or palette image whose values are class numbers."""

    path: Path
    class_of: bytes
    """256 entries: class index of each value in the file; `IGNORE` for the ignore label and values without a class."""

    def read(self) -> NDArray[np.uint8]:
        """Decode. Shape: uint8 (H, W) of class indices and `IGNORE`.

        Raises:
            ImageError: unreadable, or in RGB.
        """
        return np.frombuffer(self.class_of, np.uint8)[read_label_map(self.path)]


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """The raw values of a mask file. Shape: uint8 (H, W).

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
    """Something wrong in annotations, with what was done about it or is to be done."""

    file: str
    """Where: a file, perhaps with a line or an id."""
    kind: str
    """What sort of problem, to count by; a few words, such as "box without area"."""
    detail: str = ""
    """The offending values."""
    remedy: str = ""
    """What was done, or what to do."""

    def __str__(self) -> str:
        what = f"{self.kind} ({self.detail})" if self.detail else self.kind
        return f"{self.file}: {what}" + (f"; {self.remedy}" if self.remedy else "")


Target = TypeVar("Target", int, Boxes, Mask)


@dataclass(frozen=True, kw_only=True)
class ImageSet(Generic[Target]):
    """Images that are opened by number, and what is known of each."""

    task: Task
    """Which of the three sorts of target."""
    origin: str
    """Where they come from, for messages."""
    names: Sequence[str]
    """What to call each image: a path relative to the origin, or a row."""
    targets: Sequence[Target]
    """One an image. Classification: index into `classes`; detection: `Boxes`; segmentation: `Mask`."""
    classes: tuple[str, ...]
    """Class names."""
    open: Callable[[int], Source]
    """Number of an image -> what `read_image` takes. Can be pickled, for reading processes that are not forked."""
    problems: tuple[Problem, ...] = field(default=(), repr=False)
    """What was found wrong in the annotations while reading them."""
    sizes: Sequence[tuple[int, int]] | None = field(default=None, repr=False)
    """(width, height) of each image, where the annotations or the reader know it; to be compared with the file."""
    shards: Sequence[range] | None = field(default=None, repr=False)
    """Consecutive numbers of images that lie in one file, where reading one makes the others cheap; samplers shuffle
    with that in mind. Every image is in one of them."""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Sequence[int]) -> ImageSet[Target]:
        """The images at `indices`, in that order."""
        return replace(
            self,
            names=[self.names[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            open=partial(_open_at, self.open, indices),
            sizes=None if self.sizes is None else [self.sizes[i] for i in indices],
            shards=None,
        )

    def fingerprint(self) -> str:
        """A short hash of names and targets: equal for equal data, wherever they lie."""
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
        """Images (classification) or objects (detection) of each class; masks are not opened for this."""
        counts: Counter[int] = Counter()
        for target in self.targets:
            if isinstance(target, Boxes):
                counts.update(target.labels[~target.crowd].tolist())
            elif not isinstance(target, Mask):
                counts[target] += 1
        return [counts[index] for index in range(len(self.classes))]

    def relabel(self, classes: tuple[str, ...]) -> ImageSet[Target]:
        """The same images, labeled in the order of a model's `classes`.

        Raises:
            ValueError: a class the model does not know.
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
        # Others are of crowds, the only objects that `relabel` lets pass without a class.
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
        ValueError: no image or object of some class, or too few classes.
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
    """Hold out `val_fraction` of the images; the same for the same names and seed.

    Classification: of every class, at least one image. Detection: of the images with each rarest class, so that
    rare classes are in both parts. Segmentation: of all.

    Raises:
        ValueError: a single image of a class, or in all.
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
    return data.subset(sorted(train)), replace(data.subset(sorted(val)), problems=())  # told once is enough


def _strata(data: ImageSet[Any]) -> list[tuple[str, list[int]]]:
    """Numbers of the images, in order of their names, grouped by what decides their class."""
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
