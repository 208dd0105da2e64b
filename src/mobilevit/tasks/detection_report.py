"""Detection: the figures of an evaluation, and the images that show them.

K classes; one image has N detections and G objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_iou

from mobilevit.imaging import drawing
from mobilevit.imaging.preprocessing import Placement
from mobilevit.plotting import new_figure, save_figure
from mobilevit.results.base import Outputs
from mobilevit.results.detection import Detections, decode_detections, to_pixels
from mobilevit.tasks.report import ClassScores, Meter, Report, plot_text, save_bars, shown
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
class DetectionClassScores(ClassScores):
    """The figures of one class; its AP is None where the truth has no object of it."""

    ap: float | None = field(metadata=shown("AP", ".3f"))
    """Average precision, mean over IoU thresholds 0.50 to 0.95."""
    ap50: float | None = field(metadata=shown("AP50", ".3f"))
    """Average precision at IoU 0.50."""
    precision: float | None = field(metadata=shown("precision", ".3f"))
    """Share of the detections from the score threshold up that are right; None where there are none."""
    recall: float | None = field(metadata=shown("recall", ".3f"))
    """Share of the objects that these find; None where there are none."""
    num_objects: int = field(metadata=shown("objects", ","))
    """In the truth, without crowds."""
    curve: NDArray[np.float64] | None = field(repr=False)
    """Precision at IoU 0.50 for each of `RECALLS`: the best at that recall or a higher one."""


@dataclass(frozen=True, kw_only=True)
class DetectionReport(Report):
    """The figures of a detector on images with boxes; those named AP and AR are COCO's.

    A class without any object in the truth does not count in their means. Crowds are neither missed nor found.
    """

    num_objects: int
    """In the truth, without crowds."""
    ap: float = field(metadata=shown("AP", ".3f"))
    """Mean average precision over IoU thresholds 0.50 to 0.95; 0 where there is no object at all."""
    ap50: float = field(metadata=shown("AP50", ".3f"))
    ap75: float = field(metadata=shown("AP75", ".3f"))
    ap_small: float | None = field(metadata=shown("AP small", ".3f"))
    """AP of objects below 32 x 32 pixels; None where there are none, as in the next two."""
    ap_medium: float | None = field(metadata=shown("AP medium", ".3f"))
    ap_large: float | None = field(metadata=shown("AP large", ".3f"))
    """AP of objects above 96 x 96 pixels."""
    ar100: float = field(metadata=shown("AR100", ".3f"))
    """Mean share of objects found by up to a hundred detections an image, over the same IoU thresholds."""
    score_threshold: float = field(metadata=shown("best score threshold", ".3f"))
    """Detections from this score up have the best F1 at IoU 0.50, all classes together; 0.5 where none is right."""
    precision: float = field(metadata=shown("precision there", ".3f"))
    """At that threshold, all classes together: share of the detections that are right."""
    recall: float = field(metadata=shown("recall there", ".3f"))
    """Share of the objects that are found."""
    f1: float
    """Harmonic mean of the two."""
    per_class: tuple[DetectionClassScores, ...]

    score_name = "ap"
    summarized = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100", "f1")

    @property
    def min_score(self) -> float:
        return self.score_threshold

    def save_plots(self, folder: Path) -> None:
        """Write `pr_curves.png`, `per_class.png` and `per_class.csv`."""
        self.save_table(folder / "per_class.csv")
        _save_curves(self, folder / "pr_curves.png")
        known = sorted((c for c in self.per_class if c.ap is not None), key=lambda c: -(c.ap or 0))
        save_bars(
            folder / "per_class.png",
            [f"{plot_text(c.name)} ({c.num_objects:,})" for c in known],
            {"AP50": [c.ap50 or 0 for c in known], "AP": [c.ap or 0 for c in known]},
            ["#56b4e9", "#0072b2"],
            title=f"AP by class (objects); mean AP {self.ap:.3f}, AP50 {self.ap50:.3f}",
            form=".3f",
        )


class DetectionImage:
    """Detections and true objects of one image, in its pixels."""

    def __init__(self, found: Detections, truth: Boxes) -> None:
        self.found, self.truth = found, truth
        self.outcome = _match(found, truth)
        """(N,): `RIGHT`, `WRONG` or `NOT_COUNTED` at IoU 0.50, the same whatever score detections are cut at."""

    def count(self, score_threshold: float) -> tuple[int, int, int]:
        """Count the objects found and missed, and the detections that found none, from a score up."""
        shown = self.outcome[self.found.scores >= score_threshold]
        found = int((shown == RIGHT).sum())
        return found, int((~self.truth.crowd).sum()) - found, int((shown == WRONG).sum())


class DetectionMeter(Meter[Boxes]):
    """Gathers detections and true objects."""

    images: dict[int, DetectionImage]

    def add(self, index: int, outputs: Outputs, truth: Boxes, placement: Placement) -> None:
        self.images[index] = DetectionImage(to_pixels(decode_detections(outputs), placement), truth)

    def best_threshold(self) -> float:
        """Find the score from which up detections have the best F1 at IoU 0.50; 0.5 where none is right."""
        scores, _, outcome = self._detections()
        order = np.argsort(-scores, kind="stable")
        order = order[outcome[order] != NOT_COUNTED]
        right = np.cumsum(outcome[order] == RIGHT)
        if not len(right) or not right[-1]:
            return 0.5
        ranked = scores[order]
        f1 = 2 * right / (np.arange(1, len(right) + 1) + int(self._objects().sum()))
        last_of_its_score = np.append(ranked[1:] < ranked[:-1], True)
        best = int(np.where(last_of_its_score, f1, -1).argmax())
        # Six places are what files hold; rounded down, so that the detection itself stays in.
        return math.floor(float(ranked[best]) * 1e6) / 1e6

    def errors(self) -> dict[int, float]:
        """The objects missed and the detections of none, at the best threshold."""
        threshold = self.best_threshold()
        return {index: sum(image.count(threshold)[1:]) for index, image in self.images.items()}

    def report(self) -> DetectionReport:
        precisions, recalls = self._coco()
        scores, labels, outcome = self._detections()
        threshold = self.best_threshold()
        shown, objects = scores >= threshold, self._objects()
        right = np.bincount(labels[shown & (outcome == RIGHT)], minlength=len(objects))
        wrong = np.bincount(labels[shown & (outcome == WRONG)], minlength=len(objects))
        num_objects, num_right, num_wrong = int(objects.sum()), int(right.sum()), int(wrong.sum())
        return DetectionReport(
            num_images=len(self.images),
            num_objects=num_objects,
            ap=_mean(precisions[..., 0]) or 0.0,
            ap50=_mean(precisions[0, ..., 0]) or 0.0,
            ap75=_mean(precisions[5, ..., 0]) or 0.0,
            ap_small=_mean(precisions[..., 1]),
            ap_medium=_mean(precisions[..., 2]),
            ap_large=_mean(precisions[..., 3]),
            ar100=_mean(recalls) or 0.0,
            score_threshold=threshold,
            precision=num_right / max(num_right + num_wrong, 1),
            recall=num_right / max(num_objects, 1),
            f1=2 * num_right / max(num_right + num_wrong + num_objects, 1),
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

    def draw(self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[Boxes]) -> Image.Image:
        """Draw what was found in its class's color and the true objects dashed; captions are green if all is right."""
        threshold, cell = self.best_threshold(), 340
        palette, legend = drawing.class_colors(len(self.classes)), len(self.classes) <= MOST_IN_LEGEND
        cells, captions, colors = [], [], []
        labels_shown: set[int] = set()
        for image, seen in zip(images, [self.images[index] for index in indices], strict=True):
            scale = cell / max(image.size)
            by_score = np.argsort(-seen.found.scores, kind="stable")
            shown = by_score[seen.found.scores[by_score] >= threshold]
            labels = seen.found.class_ids[shown].tolist()
            labels_shown.update(labels)
            texts = ["" if legend else self.classes[label] for label in labels]
            boxes = seen.found.boxes_xyxy[shown] * scale
            small = drawing.draw_boxes(drawing.fit(image, cell), boxes, texts, [palette[label] for label in labels])
            cells.append(drawing.draw_outlines(small, seen.truth.xyxy * scale))
            found, missed, wrong = seen.count(threshold)
            captions.append([f"{found} of {found + missed} found" + (f", {wrong} wrong" if wrong else "")])
            colors.append(drawing.RED if missed or wrong else drawing.GREEN)
        sheet = drawing.contact_sheet(cells, captions, colors, columns=4, cell=cell)
        names = {label: self.classes[label] for label in sorted(labels_shown)}
        return drawing.with_legend(sheet, names, len(self.classes)) if legend else sheet

    def _objects(self) -> NDArray[np.int64]:
        """Count the true objects of each class, without crowds. Shape: (K,)."""
        labels = [image.truth.labels[~image.truth.crowd] for image in self.images.values()]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(self.classes))

    def _detections(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int8]]:
        """Scores, labels and outcomes of all images, in the order of `indices`."""
        images = [self.images[index] for index in self.indices]
        return (
            np.concatenate([np.zeros(0, np.float32), *(image.found.scores for image in images)]),
            np.concatenate([np.zeros(0, np.int64), *(image.found.class_ids for image in images)]),
            np.concatenate([np.zeros(0, np.int8), *(image.outcome for image in images)]),
        )

    def _coco(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """COCO's precision and recall with a hundred detections an image and class; -1 where there is no object.

        Shape: (10 IoU thresholds, 101 recalls, K, 4 sizes: all, small, medium, large), (10, K).
        """
        from torchmetrics.detection import MeanAveragePrecision

        precisions = np.full((len(_IOUS), len(RECALLS), len(self.classes), 4), -1.0)
        recalls = np.full((len(_IOUS), len(self.classes)), -1.0)
        if not self._objects().any():
            return precisions, recalls
        # Its own thresholds are float32: 0.1 is then more than one object of ten, and results are not COCO's.
        thresholds = {"iou_thresholds": _IOUS.tolist(), "rec_thresholds": RECALLS.tolist()}
        metric = MeanAveragePrecision(**thresholds, extended_summary=True, backend="faster_coco_eval")
        metric.warn_on_many_detections = False
        found, true = [], []
        for image in (self.images[index] for index in self.indices):
            boxes, scores, labels = map(torch.from_numpy, image.found)
            found.append({"boxes": boxes.double(), "scores": scores, "labels": labels})
            truth = image.truth
            xyxy, labels, crowd, areas = map(torch.from_numpy, (truth.xyxy, truth.labels, truth.crowd, truth.areas))
            true.append({"boxes": xyxy.double(), "labels": labels, "iscrowd": crowd.long(), "area": areas})
        metric.update(found, true)
        result = metric.compute()
        seen = result["classes"].reshape(-1).tolist()  # of one class alone it is a scalar
        precisions[:, :, seen] = result["precision"][..., -1].numpy()
        recalls[:, seen] = result["recall"][:, :, 0, -1].numpy()
        return precisions, recalls


def _match(found: Detections, truth: Boxes) -> NDArray[np.int8]:
    """As COCO matches: the surest first, each with the free object of its class that it overlaps most."""
    boxes, scores, labels = found
    outcome = np.zeros(len(boxes), np.int8)
    if not len(boxes) or not len(truth.xyxy):
        return outcome
    same_class = labels[:, None] == truth.labels
    ious = np.nan_to_num(box_iou(torch.from_numpy(boxes), torch.from_numpy(truth.xyxy)).numpy())
    ious = np.where(same_class & ~truth.crowd & (ious >= _MATCH_IOU), ious, 0)
    order = np.argsort(-scores, kind="stable")
    for row in order[ious[order].any(axis=1)].tolist():
        best = int(ious[row].argmax())
        if ious[row, best]:
            outcome[row] = RIGHT
            ious[:, best] = 0
    if truth.crowd.any():
        low, high = np.maximum(boxes[:, None, :2], truth.xyxy[:, :2]), np.minimum(boxes[:, None, 2:], truth.xyxy[:, 2:])
        inside = (high - low).clip(min=0).prod(axis=2)
        areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
        in_crowd = same_class & truth.crowd & (inside > 0) & (inside >= _MATCH_IOU * areas[:, None])
        outcome[(outcome == WRONG) & in_crowd.any(axis=1)] = NOT_COUNTED
    return outcome


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _share(part: int, whole: int) -> float | None:
    return int(part) / int(whole) if whole else None


def _save_curves(report: DetectionReport, path: Path) -> None:
    """Draw a curve for each class with objects, the best first, their mean, and the score threshold as a star."""
    figure = new_figure(8.5, 5.2)
    axes = figure.add_subplot()
    colors = np.array(drawing.class_colors(len(report.per_class))) / 255
    known = [(c, c.curve, color) for c, color in zip(report.per_class, colors, strict=True) if c.curve is not None]
    known.sort(key=lambda row: -(row[0].ap50 or 0))
    width, alpha = (1.6, 1.0) if len(known) <= _MOST_CURVES else (0.7, 0.6)
    for place, (scores, curve, color) in enumerate(known):
        label = f"{scores.ap50:.3f}  {plot_text(scores.name, 24)}" if place < _MOST_CURVES else None
        axes.plot(RECALLS, curve, color=color, lw=width, alpha=alpha, label=label)
    if known:
        mean = np.mean([curve for _, curve, _ in known], axis=0)
        axes.plot(RECALLS, mean, color="black", lw=2.2, ls="--", label=f"{report.ap50:.3f}  mean")
        label = f"all, scores from {report.score_threshold:.2f}"
        axes.plot(report.recall, report.precision, "*", color="black", ms=13, clip_on=False, zorder=4, label=label)
        legend = axes.legend(title="AP50", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set(xlabel="recall", ylabel="precision at IoU 0.50", xlim=(0, 1.01), ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    save_figure(figure, path)
