"""Classification: the figures of an evaluation, and the images that show them.

K classes, M images in an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.files import Json
from mobilevit.imaging.drawing import GREEN, RED, contact_sheet
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import Outputs, float32
from mobilevit.results.classification import softmax
from mobilevit.tasks.report import ClassScores, Meter, Report, save_confusion_matrix, shown


@dataclass(frozen=True, kw_only=True)
class ClassificationClassScores(ClassScores):
    """The figures of one class."""

    precision: float = field(metadata=shown("precision", ".3f"))
    """Share of the images called so that are so."""
    recall: float = field(metadata=shown("recall", ".3f"))
    """Share of the images that are so which are called so."""
    f1: float = field(metadata=shown("F1", ".3f"))
    """Harmonic mean of the two."""
    support: int = field(metadata=shown("images", ","))
    """Images of this class."""


@dataclass(frozen=True, kw_only=True)
class ClassificationReport(Report):
    """The figures of a classifier on labeled images."""

    top1: float = field(metadata=shown("top-1", ".2%"))
    """Share of images whose most probable class is right."""
    top5: float | None = field(metadata=shown("top-5", ".2%"))
    """Share whose right class is among the five most probable; None below six classes, where it says little."""
    loss: float = field(metadata=shown("loss", ".4f"))
    """Mean cross-entropy, without label smoothing, in nats."""
    calibration_error: float = field(metadata=shown("calibration error", ".4f"))
    """Expected gap between confidence and accuracy over 15 bins (arXiv:1706.04599)."""
    per_class: tuple[ClassificationClassScores, ...]
    confusion: NDArray[np.int64] = field(repr=False)
    """(K, K): rows are the true classes, columns the predicted ones."""

    score_name = "top1"
    summarized = ("top1", "top5", "loss", "calibration_error")

    def to_dict(self) -> Json:
        """Plain values for JSON, without a top-5 that is None."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def save_plots(self, folder: Path) -> None:
        """Write `confusion_matrix.csv`, and `confusion_matrix.png` if it is legible."""
        names = [scores.name for scores in self.per_class]
        title = f"{self.top1:.1%} of {self.num_images:,} right"
        save_confusion_matrix(self.confusion, names, folder, title=title)


def classification_report(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> ClassificationReport:
    """Compute every figure of an evaluation from all its logits.

    Shape: float32 logits (M, K), int64 labels (M,).
    """
    num_classes = len(classes)
    predicted, confidence = logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    right = confusion.diagonal().double()
    precision = right / confusion.sum(dim=0).clamp(min=1)
    recall = right / confusion.sum(dim=1).clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    top5 = None
    if num_classes > 5:
        top5 = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), confusion.sum(dim=1).tolist())
    return ClassificationReport(
        num_images=len(labels),
        top1=(right.sum() / max(len(labels), 1)).item(),
        top5=top5,
        loss=F.cross_entropy(logits, labels).item(),
        calibration_error=_calibration_error(confidence, predicted == labels),
        per_class=tuple(
            ClassificationClassScores(name=name, precision=p, recall=r, f1=f, support=n)
            for name, p, r, f, n in zip(classes, *columns, strict=True)
        ),
        confusion=confusion.numpy(force=True),
    )


def _calibration_error(confidence: Tensor, is_right: Tensor) -> float:
    """Expected calibration error in 15 bins of equal width (Guo et al., arXiv:1706.04599).

    torchmetrics has it, but takes seconds to import, in every run.
    """
    bins = (confidence.nan_to_num() * 15).long()
    gaps = torch.bincount(bins, weights=confidence.double() - is_right.double())
    return gaps.abs().sum().item() / max(len(confidence), 1)


class ClassificationMeter(Meter[int]):
    """Gathers logits and labels."""

    images: dict[int, tuple[NDArray[np.float32], int]]

    def add(self, index: int, outputs: Outputs, truth: int, placement: Placement) -> None:
        self.images[index] = (float32(outputs["logits"]).copy(), truth)

    def _logits(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """Stack the logits of some images. Shape: (M, K)."""
        return np.array([self.images[index][0] for index in indices], np.float32).reshape(-1, len(self.classes))

    def errors(self) -> dict[int, float]:
        """The probability of the class that the model took an image for, if that was wrong."""
        errors = {}
        for index, probabilities in zip(self.indices, softmax(self._logits(self.indices)), strict=True):
            is_right = probabilities.argmax() == self.images[index][1]
            errors[index] = 0.0 if is_right else float(probabilities.max())
        return errors

    def report(self) -> ClassificationReport:
        labels = torch.tensor([self.images[index][1] for index in self.indices], dtype=torch.int64)
        return classification_report(torch.from_numpy(self._logits(self.indices)), labels, self.classes)

    def draw(self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[int]) -> Image.Image:
        return prediction_sheet(images, softmax(self._logits(indices)), truths, self.classes)


def prediction_sheet(
    images: Sequence[Image.Image],
    probabilities: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    columns: int = 6,
    cell: int = 176,
) -> Image.Image:
    """Draw images with the most probable class: green where right, red with the truth where wrong."""
    captions, colors = [], []
    for shares, label in zip(probabilities, labels, strict=True):
        predicted = int(shares.argmax())
        said = f"{classes[predicted]} {shares[predicted]:.0%}"
        captions.append([said, "" if predicted == label else f"is {classes[label]}"])
        colors.append(GREEN if predicted == label else RED)
    return contact_sheet(images, captions, colors, columns=columns, cell=cell)
