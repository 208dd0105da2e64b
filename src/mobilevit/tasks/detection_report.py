"""Detection: the figures of an evaluation, and the images that show them.

K classes; one image has N detections and G objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torchvision.ops import box_iou

from mobilevit.imaging.drawing import (
    GREEN,
    RED,
    class_colors,
    contact_sheet,
    draw_boxes,
    draw_outlines,
    fit,
    with_legend,
)
from mobilevit.imaging.preprocessing import Placement
from mobilevit.plotting import new_figure, save_figure
from mobilevit.results.base import Outputs
from mobilevit.results.detection import decode_detections, to_pixels
from mobilevit.tasks.report import as_text, plot_text, rounded, save_csv
from mobilevit.tasks.targets import Boxes

RIGHT, WRONG, NOT_COUNTED = 1, 0, -1
"""Outcome of a detection: it found an object, it found none, or it lies in a crowd."""

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is sampled, as in COCO."""

_IOUS = np.linspace(0.5, 0.95, 10)
_MATCH_IOU = 0.5
_MOST_CURVES = 20
MOST_IN_LEGEND = 12


@dataclass(frozen=True, kw_only=True)
class DetectionClassScores:
    """How one class fared; its AP is None where the truth has no object of it."""

    name: str
    ap: float | None
    """Average precision, mean over IoU thresholds 0.50 to 0.95."""
    ap50: float | None
    """Average precision at IoU 0.50."""
    precision: float | None
    """Share of the detections from the score threshold up that are right; None where there are none."""
    recall: float | None
    """Share of the objects that these find; None where there are none."""
    num_objects: int
    """In the truth, without crowds."""
    curve: NDArray[np.float64] | None = field(repr=False)
    """Precision at IoU 0.50 for each of `RECALLS`: the best at that recall or a higher one."""


@dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """How a detector fared on images with boxes; figures named AP and AR are COCO's.

    A class without any object in the truth does not count in their means. Crowds are neither missed nor found.
    """

    num_images: int
    num_objects: int
    """In the truth, without crowds."""
    ap: float
    """Mean average precision over IoU thresholds 0.50 to 0.95; 0 where there is no object at all."""
    ap50: float
    ap75: float
    ap_small: float | None
    """AP of objects below 32 x 32 pixels; None where there are none, as in the next two."""
    ap_medium: float | None
    ap_large: float | None
    """AP of objects above 96 x 96 pixels."""
    ar100: float
    """Mean share of objects found by up to a hundred detections an image, over the same IoU thresholds."""
    score_threshold: float
    """Detections from this score up have the best F1 at IoU 0.50, all classes together; 0.5 where none is right."""
    precision: float
    """At that threshold, all classes together: share of the detections that are right."""
    recall: float
    """Share of the objects that are found."""
    f1: float
    """Harmonic mean of the two."""
    per_class: tuple[DetectionClassScores, ...]

    score_name = "ap"

    @property
    def score(self) -> float:
        """The figure that decides which weights are best."""
        return self.ap

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name."""
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100", "f1")
        return {name: round(getattr(self, name), 6) for name in names if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {key: rounded(value) for key, value in vars(self).items() if key != "per_class"}
        per_class = []
        for scores in self.per_class:
            row = {key: rounded(value) for key, value in vars(scores).items() if key != "curve"}
            curve = None if scores.curve is None else [round(value, 6) for value in scores.curve.tolist()]
            per_class.append({**row, "curve": curve})
        return {**values, "per_class": per_class}

    def headline(self) -> list[tuple[str, str]]:
        """Return the main figures, as pairs of name and text."""
        sizes = [("AP small", self.ap_small), ("AP medium", self.ap_medium), ("AP large", self.ap_large)]
        return [
            ("AP", f"{self.ap:.3f}"),
            ("AP50", f"{self.ap50:.3f}"),
            ("AP75", f"{self.ap75:.3f}"),
            *((name, f"{value:.3f}") for name, value in sizes if value is not None),
            ("AR100", f"{self.ar100:.3f}"),
            ("best score threshold", f"{self.score_threshold:.3f}"),
            ("precision there", f"{self.precision:.3f}"),
            ("recall there", f"{self.recall:.3f}"),
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the table of classes."""
        rows = [
            [c.name, as_text(c.ap), as_text(c.ap50), as_text(c.precision), as_text(c.recall), f"{c.num_objects:,}"]
            for c in self.per_class
        ]
        return ["class", "AP", "AP50", "precision", "recall", "objects"], rows

    def save_plots(self, folder: Path) -> None:
        """Write `pr_curves.png`, `per_class.png` and `per_class.csv`."""
        fields = ("name", "ap", "ap50", "precision", "recall", "num_objects")
        save_csv(folder / "per_class.csv", [fields, *([getattr(c, f) for f in fields] for c in self.per_class)])
        _save_curves(self, folder / "pr_curves.png")
        _save_bars(self, folder / "per_class.png")


@dataclass(frozen=True, kw_only=True)
class DetectionImage:
    """Detections and true objects of one image. Boxes are left, top, right, bottom in its pixels."""

    boxes_xyxy: NDArray[np.float32]
    """(N, 4)."""
    scores: NDArray[np.float32]
    """(N,)."""
    labels: NDArray[np.int64]
    """(N,) class numbers."""
    true_xyxy: NDArray[np.float32]
    """(G, 4)."""
    true_labels: NDArray[np.int64]
    """(G,) class numbers."""
    true_crowd: NDArray[np.bool_]
    """(G,)."""
    true_areas: NDArray[np.float32]
    """(G,) pixels."""
    outcome: NDArray[np.int8]
    """(N,): `RIGHT`, `WRONG` or `NOT_COUNTED` at IoU 0.50.

    The surest detections choose first, so the outcome of each is the same whatever score they are cut at.
    """

    @property
    def num_objects(self) -> int:
        """Without crowds."""
        return int((~self.true_crowd).sum())

    def count(self, score_threshold: float) -> tuple[int, int, int]:
        """How many objects were found and missed, and how many detections found none, from a score up."""
        shown = self.outcome[self.scores >= score_threshold]
        found = int((shown == RIGHT).sum())
        return found, self.num_objects - found, int((shown == WRONG).sum())


class DetectionMeter:
    """Gathers detections and true objects, image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.images: dict[int, DetectionImage] = {}
        """By their place in the data."""

    def update(
        self,
        index: int,
        *,
        boxes_xyxy: ArrayLike,
        scores: ArrayLike,
        labels: ArrayLike,
        true_xyxy: ArrayLike,
        true_labels: ArrayLike,
        true_crowd: ArrayLike | None = None,
        true_areas: ArrayLike | None = None,
    ) -> None:
        """Add an image: arrays or tensors on the CPU, shaped as in `DetectionImage`.

        Without `true_crowd` no object is a crowd; without `true_areas`, and where they are zero, those of the boxes
        count.
        """
        found, true = (np.asarray(boxes).astype(np.float32).reshape(-1, 4) for boxes in (boxes_xyxy, true_xyxy))
        found_labels, there = (np.asarray(numbers).astype(np.int64).reshape(-1) for numbers in (labels, true_labels))
        sure = np.asarray(scores).astype(np.float32).reshape(-1)
        crowd = np.asarray(np.zeros(len(true)) if true_crowd is None else true_crowd).astype(np.bool_).reshape(-1)
        own_areas = _areas(true)
        areas = own_areas if true_areas is None else np.asarray(true_areas).astype(np.float32).reshape(-1)
        self.images[index] = DetectionImage(
            boxes_xyxy=found,
            scores=sure,
            labels=found_labels,
            true_xyxy=true,
            true_labels=there,
            true_crowd=crowd,
            true_areas=np.where(areas > 0, areas, own_areas),
            outcome=_match(found, sure, found_labels, true, there, crowd),
        )

    def add(self, index: int, outputs: Outputs, truth: Boxes, placement: Placement) -> None:
        """Take in the outputs for one image; see `Meter`."""
        boxes, scores, class_ids = to_pixels(decode_detections(outputs), placement)
        self.update(
            index,
            boxes_xyxy=boxes,
            scores=scores,
            labels=class_ids,
            true_xyxy=truth.xyxy,
            true_labels=truth.labels,
            true_crowd=truth.crowd,
            true_areas=truth.areas,
        )

    def draw(self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[Boxes]) -> Image.Image:
        """Draw predictions and truths of some of the images seen on one sheet."""
        seen = [self.images[index] for index in indices]
        return detection_sheet(images, seen, self.classes, self.best_threshold())

    def merge(self, other: Self) -> None:
        """Take over what another process has seen; images seen by both count once."""
        self.images = other.images | self.images

    @property
    def indices(self) -> list[int]:
        """The images seen, ascending."""
        return sorted(self.images)

    def best_threshold(self) -> float:
        """The score from which up detections have the best F1 at IoU 0.50; 0.5 where none is right."""
        scores, _, outcome = self._detections()
        order = np.argsort(-scores, kind="stable")
        order = order[outcome[order] != NOT_COUNTED]
        right = np.cumsum(outcome[order] == RIGHT)
        if not len(right) or not right[-1]:
            return 0.5
        ranked = scores[order]
        num_objects = sum(image.num_objects for image in self.images.values())
        f1 = 2 * right / (np.arange(1, len(right) + 1) + num_objects)
        last_of_its_score = np.append(ranked[1:] < ranked[:-1], True)
        best = int(np.where(last_of_its_score, f1, -1).argmax())
        # Six places are what files hold; rounded down, so that the detection itself stays in.
        return math.floor(float(ranked[best]) * 1e6) / 1e6

    def worst(self, count: int = 24) -> list[int]:
        """The images with most objects missed and detections of none at the best threshold, without flawless ones."""
        threshold = self.best_threshold()
        errors = {index: sum(image.count(threshold)[1:]) for index, image in self.images.items()}
        return sorted((index for index in errors if errors[index]), key=lambda index: (-errors[index], index))[:count]

    def report(self) -> DetectionReport:
        """Every figure, from all images seen so far."""
        precisions, recalls = self._coco()
        scores, labels, outcome = self._detections()
        threshold = self.best_threshold()
        shown = scores >= threshold
        num_classes = len(self.classes)
        right = np.bincount(labels[shown & (outcome == RIGHT)], minlength=num_classes)
        wrong = np.bincount(labels[shown & (outcome == WRONG)], minlength=num_classes)
        objects = np.zeros(num_classes, np.int64)
        for image in self.images.values():
            objects += np.bincount(image.true_labels[~image.true_crowd], minlength=num_classes)
        total, all_right = int(objects.sum()), int(right.sum())
        return DetectionReport(
            num_images=len(self.images),
            num_objects=total,
            ap=_mean(precisions[..., 0]) or 0.0,
            ap50=_mean(precisions[0, ..., 0]) or 0.0,
            ap75=_mean(precisions[5, ..., 0]) or 0.0,
            ap_small=_mean(precisions[..., 1]),
            ap_medium=_mean(precisions[..., 2]),
            ap_large=_mean(precisions[..., 3]),
            ar100=_mean(recalls) or 0.0,
            score_threshold=threshold,
            precision=all_right / max(all_right + int(wrong.sum()), 1),
            recall=all_right / max(total, 1),
            f1=2 * all_right / max(all_right + int(wrong.sum()) + total, 1),
            per_class=tuple(
                DetectionClassScores(
                    name=name,
                    ap=_mean(precisions[:, :, number, 0]),
                    ap50=_mean(precisions[0, :, number, 0]),
                    precision=_share(right[number], right[number] + wrong[number]),
                    recall=_share(right[number], objects[number]),
                    num_objects=int(objects[number]),
                    curve=precisions[0, :, number, 0] if objects[number] else None,
                )
                for number, name in enumerate(self.classes)
            ),
        )

    def _detections(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int8]]:
        """Scores, labels and outcomes of all images, in the order of `indices`."""
        images = [self.images[index] for index in self.indices]
        return (
            np.concatenate([np.zeros(0, np.float32), *(p.scores for p in images)]),
            np.concatenate([np.zeros(0, np.int64), *(p.labels for p in images)]),
            np.concatenate([np.zeros(0, np.int8), *(p.outcome for p in images)]),
        )

    def _coco(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """COCO's precision and recall with a hundred detections an image and class; -1 where there is no object.

        Shape: (10 IoU thresholds, 101 recalls, K, 4 sizes: all, small, medium, large), (10, K).
        """
        from torchmetrics.detection import MeanAveragePrecision

        precisions = np.full((len(_IOUS), len(RECALLS), len(self.classes), 4), -1.0)
        recalls = np.full((len(_IOUS), len(self.classes)), -1.0)
        if not any(image.num_objects for image in self.images.values()):
            return precisions, recalls
        # Its own thresholds are float32: 0.1 is then more than one object of ten, and results are not COCO's.
        metric = MeanAveragePrecision(
            iou_thresholds=_IOUS.tolist(),
            rec_thresholds=RECALLS.tolist(),
            extended_summary=True,
            backend="faster_coco_eval",
        )
        metric.warn_on_many_detections = False
        for index in self.indices:
            image = self.images[index]
            found = {
                "boxes": torch.from_numpy(image.boxes_xyxy.astype(np.float64)),
                "scores": torch.from_numpy(image.scores),
                "labels": torch.from_numpy(image.labels),
            }
            true = {
                "boxes": torch.from_numpy(image.true_xyxy.astype(np.float64)),
                "labels": torch.from_numpy(image.true_labels),
                "iscrowd": torch.from_numpy(image.true_crowd.astype(np.int64)),
                "area": torch.from_numpy(image.true_areas),
            }
            metric.update([found], [true])
        result = metric.compute()
        seen = result["classes"].reshape(-1).tolist()  # of one class alone it is a scalar
        precisions[:, :, seen] = result["precision"][..., -1].numpy()
        recalls[:, seen] = result["recall"][:, :, 0, -1].numpy()
        return precisions, recalls


def detection_sheet(
    images: Sequence[Image.Image],
    observed: Sequence[DetectionImage],
    classes: Sequence[str],
    score_threshold: float,
    *,
    cell: int = 340,
) -> Image.Image:
    """Images with what was found in their class's color, and the true objects dashed in black and white.

    Few classes stand in a legend, many at their boxes. The captions count what was found, missed and wrong: green where
    all is right, else red.
    """
    palette, legend = class_colors(len(classes)), len(classes) <= MOST_IN_LEGEND
    cells, captions, colors = [], [], []
    seen: set[int] = set()
    for image, one in zip(images, observed, strict=True):
        scale = cell / max(image.size)
        by_score = np.argsort(-one.scores, kind="stable")
        shown = by_score[one.scores[by_score] >= score_threshold]
        labels = one.labels[shown].tolist()
        seen.update(labels)
        small = draw_boxes(
            fit(image.convert("RGB"), cell),
            one.boxes_xyxy[shown] * scale,
            ["" if legend else classes[label] for label in labels],
            [palette[label] for label in labels],
        )
        cells.append(draw_outlines(small, one.true_xyxy * scale))
        found, missed, wrong = one.count(score_threshold)
        captions.append([f"{found} of {found + missed} found" + (f", {wrong} wrong" if wrong else "")])
        colors.append(RED if missed or wrong else GREEN)
    sheet = contact_sheet(cells, captions, colors, columns=4, cell=cell)
    return with_legend(sheet, [(classes[label], palette[label]) for label in sorted(seen)]) if legend else sheet


def _match(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    true: NDArray[np.float32],
    true_labels: NDArray[np.int64],
    crowd: NDArray[np.bool_],
) -> NDArray[np.int8]:
    """As COCO matches: the surest first, each with the free object of its class that it overlaps most."""
    outcome = np.zeros(len(boxes), np.int8)
    if not len(boxes) or not len(true):
        return outcome
    same_class = labels[:, None] == true_labels
    ious = np.nan_to_num(box_iou(torch.from_numpy(boxes), torch.from_numpy(true)).numpy())
    ious = np.where(same_class & ~crowd & (ious >= _MATCH_IOU), ious, 0)
    order = np.argsort(-scores, kind="stable")
    for row in order[ious[order].any(axis=1)].tolist():
        best = int(ious[row].argmax())
        if ious[row, best]:
            outcome[row] = RIGHT
            ious[:, best] = 0
    if crowd.any():
        low, high = np.maximum(boxes[:, None, :2], true[:, :2]), np.minimum(boxes[:, None, 2:], true[:, 2:])
        inside = (high - low).clip(min=0).prod(axis=2)
        in_crowd = same_class & crowd & (inside > 0) & (inside >= _MATCH_IOU * _areas(boxes)[:, None])
        outcome[(outcome == WRONG) & in_crowd.any(axis=1)] = NOT_COUNTED
    return outcome


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    areas: NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
    return areas


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _share(part: int, whole: int) -> float | None:
    return int(part) / int(whole) if whole else None


def _save_curves(report: DetectionReport, path: Path) -> None:
    figure = new_figure(8.5, 5.2)
    axes = figure.add_subplot()
    colors = class_colors(len(report.per_class))
    known = [(c, c.curve, color) for c, color in zip(report.per_class, colors, strict=True) if c.curve is not None]
    known.sort(key=lambda row: -(row[0].ap50 or 0))
    few = len(known) <= _MOST_CURVES
    for place, (scores, curve, rgb) in enumerate(known):
        color = tuple(channel / 255 for channel in rgb)
        label = f"{scores.ap50:.3f}  {plot_text(scores.name, 24)}" if place < _MOST_CURVES else None
        axes.plot(RECALLS, curve, color=color, lw=1.6 if few else 0.7, alpha=1 if few else 0.6, label=label)
        if few and scores.precision is not None and scores.recall is not None:
            axes.plot(scores.recall, scores.precision, "o", color=color, mec="black", ms=6, clip_on=False, zorder=3)
    if len(known) > 1:
        mean = np.mean([curve for _, curve, _ in known], axis=0)
        axes.plot(RECALLS, mean, color="black", lw=2.2, ls="--", label=f"{report.ap50:.3f}  mean")
    if report.num_objects:
        axes.plot(
            report.recall, report.precision, "*", color="black", ms=13, clip_on=False, zorder=4,
            label=f"all, scores from {report.score_threshold:.2f}",
        )  # fmt: skip
        legend = axes.legend(title="AP50", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set(
        xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03), title="precision and recall, IoU 0.50"
    )
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _save_bars(report: DetectionReport, path: Path) -> None:
    known = sorted((c for c in report.per_class if c.ap is not None), key=lambda c: -(c.ap or 0))
    figure = new_figure(7, 1.6 + 0.36 * max(len(known), 2))
    axes = figure.add_subplot()
    rows = np.arange(len(known))
    for offset, name, color in ((-0.2, "ap50", "#56b4e9"), (0.2, "ap", "#0072b2")):
        values = [getattr(c, name) for c in known]
        axes.barh(rows + offset, values, height=0.38, color=color, label=name.upper())
        for row, value in zip(rows, values, strict=True):
            axes.text(value + 0.01, row + offset, f"{value:.3f}", va="center", fontsize=7)
    shown = [f"{plot_text(c.name)} ({c.num_objects:,})" for c in known]
    axes.set_yticks(rows, shown, parse_math=False)
    axes.set(xlim=(0, 1.1), ylim=(max(len(known), 1) - 0.4, -0.6))
    axes.set_title(f"AP by class (objects); mean AP {report.ap:.3f}, AP50 {report.ap50:.3f}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)
