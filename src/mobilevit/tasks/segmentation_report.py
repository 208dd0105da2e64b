"""Segmentation: the figures of an evaluation, and the images that show them.

K classes; H, W height and width of one image.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.class_names import IGNORE
from mobilevit.errors import MobileViTError
from mobilevit.imaging.drawing import DARK, class_colors, contact_sheet, draw_label_map, fit, legend_of, with_legend
from mobilevit.imaging.preprocessing import Placement
from mobilevit.plotting import new_figure, save_figure
from mobilevit.results.base import Outputs
from mobilevit.results.segmentation import decode_label_map
from mobilevit.tasks.report import as_text, plot_text, rounded, save_confusion_matrix, save_csv

KEPT_WORST = 24
"""Number of images with the lowest mean IoU whose label maps a meter keeps."""


@dataclass(frozen=True, kw_only=True)
class SegmentationClassScores:
    """How one class fared."""

    name: str
    iou: float | None
    """Pixels that are and are called so / pixels that are or are called so; None where there are none of either."""
    accuracy: float | None
    """Share of the pixels of this class that are called so; None where there are none."""
    precision: float | None
    """Share of the pixels called so that are so; None where there are none."""
    share: float
    """Share of all counted pixels that are of this class."""


@dataclass(frozen=True, kw_only=True)
class SegmentationReport:
    """How a model fared on images with label maps; ignored pixels are not counted."""

    num_images: int
    miou: float
    """Mean of the classes' IoU over all images together, of those classes that occur in the truth or the prediction.

    A class that is in neither does not count; one that is predicted somewhere but is nowhere counts as zero.
    """
    pixel_accuracy: float
    """Share of the pixels whose class is right."""
    mean_class_accuracy: float
    """Mean of the classes' accuracy, of those that occur in the truth."""
    per_class: tuple[SegmentationClassScores, ...]
    confusion: NDArray[np.int64] = field(repr=False)
    """Pixels, (K, K): rows are the true classes, columns the predicted ones."""

    score_name = "miou"
    score_threshold = None

    @property
    def score(self) -> float:
        """The figure that decides which weights are best."""
        return self.miou

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name."""
        names = ("miou", "pixel_accuracy", "mean_class_accuracy")
        return {name: round(getattr(self, name), 6) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        per_class = [{key: rounded(value) for key, value in vars(scores).items()} for scores in self.per_class]
        return {
            "num_images": self.num_images, **self.summary, "per_class": per_class, "confusion": self.confusion.tolist(),
        }  # fmt: skip

    def headline(self) -> list[tuple[str, str]]:
        """Return the main figures, as pairs of name and text."""
        return [
            ("mean IoU", f"{self.miou:.2%}"),
            ("pixel accuracy", f"{self.pixel_accuracy:.2%}"),
            ("mean class accuracy", f"{self.mean_class_accuracy:.2%}"),
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the table of classes."""
        rows = [
            [c.name, as_text(c.iou), as_text(c.accuracy), as_text(c.precision), f"{c.share:.2%}"]
            for c in self.per_class
        ]
        return ["class", "IoU", "accuracy", "precision", "pixels"], rows

    def save_plots(self, folder: Path) -> None:
        """Write `per_class_iou.png`, `per_class.csv` and the confusion matrix."""
        fields = ("name", "iou", "accuracy", "precision", "share")
        save_csv(folder / "per_class.csv", [fields, *([getattr(c, f) for f in fields] for c in self.per_class)])
        names = [scores.name for scores in self.per_class]
        title = f"mean IoU {self.miou:.1%}, {self.pixel_accuracy:.1%} of the pixels right"
        save_confusion_matrix(self.confusion, names, folder, title=title, as_shares=True)
        _save_bars(self, folder / "per_class_iou.png")


@dataclass(frozen=True, kw_only=True)
class _Image:
    """The entries of one image's confusion matrix that are not zero."""

    cells: NDArray[np.int32]
    """true class * K + predicted class, ascending."""
    counts: NDArray[np.int64]
    miou: float
    """Mean IoU of this image alone; 1 where no pixel counts."""
    pixel_accuracy: float


class SegmentationMeter:
    """Gathers confusion matrices, image by image, and the label maps of a few images.

    Args:
        classes: their names.
        keep: images whose label maps are kept; those of the worst images are kept besides.
    """

    def __init__(self, classes: Sequence[str], keep: Collection[int] = ()) -> None:
        self.classes = tuple(classes)
        self.keep = frozenset(keep)
        self.label_maps: dict[int, NDArray[np.uint8]] = {}
        """uint8 (H, W) of the images to keep, and of the `KEPT_WORST` worst so far."""
        self._seen: dict[int, _Image] = {}

    def update(self, index: int, label_map: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Add an image.

        Args:
            index: its place in the data.
            label_map: predicted classes, (H, W).
            truth: true classes, (H, W); 255 is not counted.

        Raises:
            ValueError: the two differ in size, or hold what is no class.
        """
        label_map, truth = np.asarray(label_map), np.asarray(truth)
        num_classes = len(self.classes)
        if label_map.shape != truth.shape:
            raise MobileViTError(f"image {index}: a prediction of {label_map.shape} for a truth of {truth.shape}")
        counted = truth != IGNORE
        true, predicted = truth[counted], label_map[counted]
        if max(true.max(initial=0), predicted.max(initial=0)) >= num_classes:
            raise MobileViTError(f"image {index}: a value above {num_classes - 1} for {num_classes} classes")
        dense = np.bincount(true.astype(np.int32) * num_classes + predicted, minlength=num_classes**2)
        self._seen[index] = _Image(
            cells=np.flatnonzero(dense).astype(np.int32),
            counts=dense[dense > 0].astype(np.int64),
            miou=_mean(_ious(dense.reshape(num_classes, num_classes)), 1.0),
            pixel_accuracy=float((true == predicted).mean()) if true.size else 1.0,
        )
        self.label_maps[index] = label_map.astype(np.uint8)
        self._drop_label_maps()

    def add(self, index: int, outputs: Outputs, truth: NDArray[np.uint8], placement: Placement) -> None:
        """Take in the outputs for one image; see `Meter`."""
        self.update(index, decode_label_map(outputs, placement), truth)

    def draw(
        self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[NDArray[np.uint8]]
    ) -> Image.Image:
        """Draw predictions and truths of some of the images whose label maps are kept on one sheet."""
        shown = [place for place, index in enumerate(indices) if index in self.label_maps]
        return segmentation_sheet(
            [images[place] for place in shown],
            [self.label_maps[indices[place]] for place in shown],
            [truths[place] for place in shown],
            self.classes,
        )

    def merge(self, other: Self) -> None:
        """Take over what another process has seen; images seen by both count once."""
        self._seen = other._seen | self._seen
        self.label_maps = other.label_maps | self.label_maps
        self._drop_label_maps()

    def _drop_label_maps(self) -> None:
        # The worst of all images are among those kept: what was dropped had that many worse before it.
        wanted = self.keep.union(self._worst_of(self.label_maps, KEPT_WORST))
        self.label_maps = {index: kept for index, kept in self.label_maps.items() if index in wanted}

    def _worst_of(self, indices: Iterable[int], count: int) -> list[int]:
        mious = ((self._seen[index].miou, index) for index in indices)
        return [index for _, index in heapq.nsmallest(count, (pair for pair in mious if pair[0] < 1))]

    @property
    def indices(self) -> list[int]:
        """The images seen, ascending."""
        return sorted(self._seen)

    def miou_of(self, index: int) -> float:
        """Mean IoU of one image, over the classes in its truth or its prediction."""
        return self._seen[index].miou

    def pixel_accuracy_of(self, index: int) -> float:
        """Share of one image's pixels that are right."""
        return self._seen[index].pixel_accuracy

    def worst(self, count: int = KEPT_WORST) -> list[int]:
        """The images with the lowest mean IoU, lowest first, without those that are all right."""
        return self._worst_of(self._seen, count)

    def report(self) -> SegmentationReport:
        """Every figure, from all images seen so far."""
        num_classes = len(self.classes)
        cells = np.zeros(num_classes**2, np.int64)
        for image in self._seen.values():
            cells[image.cells] += image.counts
        return segmentation_report(cells.reshape(num_classes, num_classes), self.classes, num_images=len(self._seen))


def segmentation_report(confusion: NDArray[np.int64], classes: Sequence[str], *, num_images: int) -> SegmentationReport:
    """Every figure of an evaluation, from the pixels of all its images.

    Shape: confusion (K, K), rows are the true classes.
    """
    right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    ious, accuracies, precisions = _ious(confusion), _shares(right, true), _shares(right, predicted)
    total = max(int(confusion.sum()), 1)
    return SegmentationReport(
        num_images=num_images,
        miou=_mean(ious, 0.0),
        pixel_accuracy=int(right.sum()) / total,
        mean_class_accuracy=_mean(accuracies, 0.0),
        per_class=tuple(
            SegmentationClassScores(name=name, iou=iou, accuracy=accuracy, precision=precision, share=pixels / total)
            for name, iou, accuracy, precision, pixels in zip(
                classes, ious, accuracies, precisions, true.tolist(), strict=True
            )
        ),
        confusion=confusion,
    )


def segmentation_sheet(
    images: Sequence[Image.Image],
    predicted: Sequence[NDArray[np.uint8]],
    truth: Sequence[NDArray[np.uint8]],
    classes: Sequence[str],
    *,
    cell: int = 240,
) -> Image.Image:
    """Each image beside its prediction and its truth, two images a row, above a legend of all their classes.

    The captions give the mean IoU of the image, over the classes in its truth or its prediction.

    Shape: one uint8 (H, W) of the image's size for each image; in the truth, 255 is not counted.
    """
    cells: list[Image.Image] = []
    captions: list[list[str]] = []
    for number, (image, label_map, true) in enumerate(zip(images, predicted, truth, strict=True)):
        alone = SegmentationMeter(classes)
        alone.update(number, label_map, true)
        small = fit(image.convert("RGB"), cell)
        cells.append(small)
        for shown in (label_map, true):
            nearest = np.asarray(Image.fromarray(shown).resize(small.size, Image.Resampling.NEAREST))
            cells.append(draw_label_map(small, nearest, classes, opacity=0.7, legend=False))
        captions += [[f"mean IoU {alone.miou_of(number):.1%}"], ["predicted"], ["truth"]]
    sheet = contact_sheet(cells, captions, [DARK] * len(cells), columns=6, cell=cell)
    maps = [array.ravel() for array in (*predicted, *truth)]
    if not maps:
        return sheet
    return with_legend(sheet, legend_of(np.concatenate(maps), classes, with_shares=False), size=max(12, cell // 14))


def _ious(confusion: NDArray[np.int64]) -> list[float | None]:
    right = confusion.diagonal()
    return _shares(right, confusion.sum(axis=0) + confusion.sum(axis=1) - right)


def _shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def _mean(values: Sequence[float | None], without: float) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else without


def _save_bars(report: SegmentationReport, path: Path) -> None:
    from matplotlib.ticker import PercentFormatter

    colors = class_colors(len(report.per_class))
    known = [(c.iou, number) for number, c in enumerate(report.per_class) if c.iou is not None]
    known.sort(key=lambda pair: (-pair[0], pair[1]))
    figure = new_figure(7, 1.3 + 0.26 * max(len(known), 2))
    axes = figure.add_subplot()
    rows = range(len(known))
    fills = [tuple(channel / 255 for channel in colors[number]) for _, number in known]
    axes.barh(rows, [iou for iou, _ in known], color=fills, edgecolor="#444444", linewidth=0.5)
    for row, (iou, _) in enumerate(known):
        axes.text(iou + 0.01, row, f"{iou:.1%}", va="center", fontsize=8)
    axes.set_yticks(rows, [plot_text(report.per_class[number].name) for _, number in known], parse_math=False)
    axes.axvline(report.miou, color="#444444", ls="--", lw=1)
    axes.set(xlim=(0, 1.1), ylim=(max(len(known), 1) - 0.4, -0.6), title=f"IoU by class; mean {report.miou:.1%}")
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    save_figure(figure, path)
