"""An `ImageSet`: images opened by number, and a target for each, whatever the task."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from mobilevit.errors import MobileViTError, some
from mobilevit.imaging.decode import Source
from mobilevit.machine import available_cores
from mobilevit.tasks.task import Target, Task

log = logging.getLogger("mobilevit")

Value = TypeVar("Value")

_AHEAD = 64
"""Results that `in_threads` keeps."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in the data, and what was done about it or is to be done."""

    file: str
    """The file, perhaps with a line or an id."""
    kind: str
    """A few words, such as "box without area"; problems are counted by it."""
    detail: str = ""
    """The offending values."""
    remedy: str = ""
    """The repair that was made, or is to be made."""

    def __str__(self) -> str:
        what = f"{self.kind} ({self.detail})" if self.detail else self.kind
        return f"{self.file}: {what}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, kw_only=True)
class ImageSet(Generic[Target]):
    """Images that are opened by number, and a target for each."""

    task: Task[Target, Any]
    """Decides what the targets are."""
    origin: str
    """Origin of the images, for messages."""
    names: Sequence[str]
    """A name for each image: a path relative to the origin, or a row."""
    targets: Sequence[Target]
    classes: tuple[str, ...]
    open: Callable[[int], Source]
    """From the number of an image to what `read_image` takes; can be pickled for processes that are not forked."""
    problems: tuple[Problem, ...] = field(default=(), repr=False)
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
        lines = sorted(f"{self.task.describe_target(target, self.classes)}\t{name}" for name, target in pairs)
        # File names need not be UTF-8; Python keeps their other bytes as surrogates.
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]

    def class_counts(self) -> list[int]:
        """Count the images (classification) or objects (detection) of each class; masks are not opened for this."""
        return self.task.count(self.targets, len(self.classes)) or [0] * len(self.classes)

    def check_classes(self) -> None:
        """Refuse data that nothing can be learned from: no image or object of some class, or too few classes."""
        self.task.check_classes(self.origin, self.classes, self.targets)

    def relabel(self, classes: tuple[str, ...]) -> ImageSet[Target]:
        """Return the same images, labeled in the order of a model's `classes`, which it must know."""
        if self.classes == classes:
            return self
        counts = self.task.count(self.targets, len(self.classes)) or [1] * len(self.classes)
        unknown = [name for name, count in zip(self.classes, counts, strict=True) if count and name not in classes]
        if unknown:
            raise MobileViTError(
                f"{self.origin}: the checkpoint does not know {some(unknown)}; its classes are {some(classes)}. "
                "Rename the classes of the data or choose another checkpoint"
            )
        new = np.array([classes.index(name) if name in classes else -1 for name in self.classes])
        targets = [self.task.relabel(target, new) for target in self.targets]
        return replace(self, targets=targets, classes=classes)


def split(data: ImageSet[Target], *, val_fraction: float, seed: int) -> tuple[ImageSet[Target], ImageSet[Target]]:
    """Hold out `val_fraction` of the images, the same for the same names and seed.

    Classification holds out a share of every class, at least one image. Detection groups images by their rarest
    class, so that rare classes are in both parts. Segmentation takes any images.
    """
    train: list[int] = []
    val: list[int] = []
    counts = data.class_counts()
    strata: dict[int, list[int]] = {}
    for number in sorted(range(len(data)), key=lambda i: data.names[i]):
        label = data.task.stratum(data.targets[number], counts)
        strata.setdefault(-1 if label is None else label, []).append(number)
    for label, numbers in sorted(strata.items()):
        name = "" if label < 0 else data.classes[label]
        if len(numbers) < 2 and (data.task.needs_all_classes or len(data) < 2):
            whose = f"class {name} has" if data.task.needs_all_classes else "there is"
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


def in_threads(work: Callable[[int], Value], numbers: Sequence[int]) -> Iterator[Value]:
    """Call `work` for each number in threads, some ahead, and yield the results in order."""
    waiting: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        for number in numbers:
            waiting.append(pool.submit(work, number))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _open_at(opener: Callable[[int], Source], indices: Sequence[int], number: int) -> Source:
    return opener(indices[number])


AnyImages = ImageSet[Any]
"""Images of whatever task."""


def report_problems(data: AnyImages) -> None:
    """Log how many problems the annotations have, and the first five."""
    if data.problems:
        count = len(data.problems)
        log.warning("%s: %d problems in the annotations (all of them: mobilevit data check):", data.origin, count)
    for problem in data.problems[:5]:
        log.warning("  %s", problem)
