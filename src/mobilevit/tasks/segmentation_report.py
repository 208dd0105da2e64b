"""Segmentation: the figures of an evaluation, and the images that show them.

K classes; H, W height and width of one image.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.class_names import IGNORE
from mobilevit.imaging.drawing import DARK, background, class_colors, contact_sheet, draw_label_map, fit, with_legend
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import Outputs
from mobilevit.results.segmentation import decode_label_map
from mobilevit.tasks.report import ClassScores, Meter, Report, plot_text, save_bars, save_confusion_matrix, shown


@dataclass(frozen=True, kw_only=True)
class SegmentationClassScores(ClassScores):
    """The figures of one class."""

    iou: float | None = field(metadata=shown("IoU", ".3f"))
    """Pixels that are and are called so / pixels that are or are called so; None where there are none of either."""
    accuracy: float | None = field(metadata=shown("accuracy", ".3f"))
    """Share of the pixels of this class that are called so; None where there are none."""
    precision: float | None = field(metadata=shown("precision", ".3f"))
    """Share of the pixels called so that are so; None where there are none."""
    share: float = field(metadata=shown("pixels", ".2%"))
    """Share of all counted pixels that are of this class."""


@dataclass(frozen=True, kw_only=True)
class SegmentationReport(Report):
    """The figures of a model on images with label maps; ignored pixels are not counted."""

    miou: float = field(metadata=shown("mean IoU", ".2%"))
    """Mean of the classes' IoU over all images together, of those classes that occur in the truth or the prediction.

    A class that is in neither does not count; one that is predicted somewhere but is nowhere counts as zero.
    """
    pixel_accuracy: float = field(metadata=shown("pixel accuracy", ".2%"))
    """Share of the pixels whose class is right."""
    mean_class_accuracy: float = field(metadata=shown("mean class accuracy", ".2%"))
    """Mean of the classes' accuracy, of those that occur in the truth."""
    per_class: tuple[SegmentationClassScores, ...]
    confusion: NDArray[np.int64] = field(repr=False)
    """Pixels, (K, K): rows are the true classes, columns the predicted ones."""

    score_name = "miou"
    summarized = ("miou", "pixel_accuracy", "mean_class_accuracy")

    def save_plots(self, folder: Path) -> None:
        """Write `per_class_iou.png`, `per_class.csv` and the confusion matrix."""
        self.save_table(folder / "per_class.csv")
        names = [scores.name for scores in self.per_class]
        title = f"mean IoU {self.miou:.1%}, {self.pixel_accuracy:.1%} of the pixels right"
        save_confusion_matrix(self.confusion, names, folder, title=title, as_shares=True)
        colors = np.array(class_colors(len(names))) / 255
        ious = [scores.iou for scores in self.per_class]
        known = sorted(
            (label for label, iou in enumerate(ious) if iou is not None), key=lambda label: -(ious[label] or 0)
        )
        save_bars(
            folder / "per_class_iou.png",
            [plot_text(names[label]) for label in known],
            {"IoU": [ious[label] or 0 for label in known]},
            [colors[known]],
            title=f"IoU by class; mean {self.miou:.1%}",
            form=".1%",
        )


@dataclass(frozen=True, kw_only=True)
class _Image:
    """The prediction for one image, and the entries of its confusion matrix that are not zero."""

    label_map: bytes
    """Compressed, to a hundredth or so."""
    cells: NDArray[np.int32]
    """true class * K + predicted class, ascending."""
    counts: NDArray[np.int64]
    miou: float
    """Mean IoU of this image alone, over the classes in its truth or its prediction; 1 where no pixel counts."""


class SegmentationMeter(Meter[NDArray[np.uint8]]):
    """Gathers label maps and confusion matrices."""

    images: dict[int, _Image]

    def add(self, index: int, outputs: Outputs, truth: NDArray[np.uint8], placement: Placement) -> None:
        label_map = decode_label_map(outputs, placement)
        counted = truth != IGNORE
        num_classes = len(self.classes)
        cells = truth[counted].astype(np.int32) * num_classes + label_map[counted]
        dense = np.bincount(cells, minlength=num_classes**2)
        self.images[index] = _Image(
            label_map=zlib.compress(label_map.tobytes(), level=1),
            cells=np.flatnonzero(dense).astype(np.int32),
            counts=dense[dense > 0].astype(np.int64),
            miou=_mean(_ious(dense.reshape(num_classes, num_classes)), 1.0),
        )

    def errors(self) -> dict[int, float]:
        """1 minus the mean IoU, of each image."""
        return {index: 1 - image.miou for index, image in self.images.items()}

    def report(self) -> SegmentationReport:
        num_classes = len(self.classes)
        confusion = np.zeros((num_classes, num_classes), np.int64)
        for image in self.images.values():
            confusion.ravel()[image.cells] += image.counts
        right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        ious, accuracies, precisions = _ious(confusion), _shares(right, true), _shares(right, predicted)
        total = max(int(confusion.sum()), 1)
        rows = zip(self.classes, ious, accuracies, precisions, true.tolist(), strict=True)
        return SegmentationReport(
            num_images=len(self.images),
            miou=_mean(ious, 0.0),
            pixel_accuracy=int(right.sum()) / total,
            mean_class_accuracy=_mean(accuracies, 0.0),
            per_class=tuple(
                SegmentationClassScores(
                    name=name, iou=iou, accuracy=accuracy, precision=precision, share=pixels / total
                )
                for name, iou, accuracy, precision, pixels in rows
            ),
            confusion=confusion,
        )

    def draw(
        self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[NDArray[np.uint8]]
    ) -> Image.Image:
        """Draw each image beside its prediction and its truth, above a legend of the classes."""
        cell = 240
        cells: list[Image.Image] = []
        captions: list[list[str]] = []
        shown: set[int] = set()
        for seen, image, truth in zip([self.images[index] for index in indices], images, truths, strict=True):
            small = fit(image, cell)
            cells.append(small)
            predicted = np.frombuffer(zlib.decompress(seen.label_map), np.uint8).reshape(truth.shape)
            for label_map in (predicted, truth):
                shown.update(np.unique(label_map).tolist())
                nearest = np.asarray(Image.fromarray(label_map).resize(small.size, Image.Resampling.NEAREST))
                cells.append(draw_label_map(small, nearest, self.classes, opacity=0.7))
            captions += [[f"mean IoU {seen.miou:.1%}"], ["predicted"], ["truth"]]
        sheet = contact_sheet(cells, captions, [DARK] * len(cells), columns=6, cell=cell)
        labels = sorted(shown - {IGNORE, *background(self.classes)})
        return with_legend(sheet, {label: self.classes[label] for label in labels}, len(self.classes))


def _ious(confusion: NDArray[np.int64]) -> list[float | None]:
    right = confusion.diagonal()
    return _shares(right, confusion.sum(axis=0) + confusion.sum(axis=1) - right)


def _shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def _mean(values: Sequence[float | None], without: float) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else without
