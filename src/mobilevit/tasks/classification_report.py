"""Classification: the figures of an evaluation, and the images that show them.

K classes, B images in a batch, M images in an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.imaging.drawing import GREEN, RED, contact_sheet
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import Outputs, float32
from mobilevit.tasks.report import rounded, save_confusion_matrix


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """How one class fared."""

    name: str
    precision: float
    """Share of the images called so that are so."""
    recall: float
    """Share of the images that are so which are called so."""
    f1: float
    """Harmonic mean of the two."""
    support: int
    """Images of this class."""


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """How a model fared on labeled images."""

    num_images: int
    top1: float
    """Share of images whose most probable class is right."""
    top5: float | None
    """Share whose right class is among the five most probable; None below six classes, where it says little."""
    loss: float
    """Mean cross-entropy, without label smoothing, in nats."""
    calibration_error: float
    """Expected gap between confidence and accuracy over 15 bins (arXiv:1706.04599)."""
    per_class: tuple[ClassScores, ...]
    confusion: np.ndarray = field(repr=False)
    """int64 (K, K): rows are the true classes, columns the predicted ones."""

    score_name = "top1"
    score_threshold = None

    @property
    def score(self) -> float:
        """The figure that decides which weights are best."""
        return self.top1

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name."""
        named = {"top1": self.top1, "top5": self.top5, "loss": self.loss, "calibration_error": self.calibration_error}
        return {name: round(value, 6) for name, value in named.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        per_class = [{key: rounded(value) for key, value in vars(scores).items()} for scores in self.per_class]
        return {
            "num_images": self.num_images, **self.summary, "per_class": per_class, "confusion": self.confusion.tolist(),
        }  # fmt: skip

    def headline(self) -> list[tuple[str, str]]:
        """Return the main figures, as pairs of name and text."""
        top5 = [] if self.top5 is None else [("top-5", f"{self.top5:.2%}")]
        figures = [("loss", f"{self.loss:.4f}"), ("calibration error", f"{self.calibration_error:.4f}")]
        return [("top-1", f"{self.top1:.2%}"), *top5, *figures]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the table of classes."""
        rows = [
            [c.name, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", f"{c.support:,}"] for c in self.per_class
        ]
        return ["class", "precision", "recall", "F1", "images"], rows

    def save_plots(self, folder: Path) -> None:
        """Write `confusion_matrix.csv`, and `confusion_matrix.png` for up to sixty classes."""
        names = [scores.name for scores in self.per_class]
        title = f"{self.top1:.1%} of {self.num_images:,} right"
        save_confusion_matrix(self.confusion, names, folder, title=title)


def classification_report(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> ClassificationReport:
    """Every figure of an evaluation, from all its logits.

    Shape: logits (M, K), labels (M,).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    num_classes = len(classes)
    logits, labels = logits.float(), labels.long()
    probabilities = logits.softmax(dim=1)
    confusion = multiclass_confusion_matrix(logits.argmax(dim=1), labels, num_classes)
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
        calibration_error=multiclass_calibration_error(probabilities, labels, num_classes, n_bins=15).item(),
        per_class=tuple(
            ClassScores(name=name, precision=p, recall=r, f1=f, support=int(n))
            for name, p, r, f, n in zip(classes, *columns, strict=True)
        ),
        confusion=confusion.numpy(force=True),
    )


class ClassificationMeter:
    """Gathers logits and labels, image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._seen: dict[int, tuple[np.ndarray, int]] = {}

    def update(self, indices: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Shape: indices (B,), the images' places in the data; logits (B, K); labels (B,); on any device.
        """
        rows = logits.detach().float().numpy(force=True)
        for index, row, label in zip(indices, rows, labels.tolist(), strict=True):
            self._seen[int(index)] = (row.copy(), label)

    def add(self, index: int, outputs: Outputs, truth: int, placement: Placement) -> None:
        """Take in the outputs for one image; see `Meter`."""
        self._seen[index] = (float32(outputs["logits"]).copy(), truth)

    def draw(self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[int]) -> Image.Image:
        """Draw predictions and truths of some of the images seen on one sheet."""
        logits = torch.from_numpy(np.stack([self._seen[index][0] for index in indices]))
        return prediction_sheet(images, logits, truths, self.classes)

    def merge(self, other: Self) -> None:
        """Take over what another process has seen; images seen by both count once."""
        self._seen = other._seen | self._seen

    @property
    def indices(self) -> list[int]:
        """The images seen, ascending."""
        return sorted(self._seen)

    @property
    def logits(self) -> Tensor:
        """In the order of `indices`. Shape: float32 (M, K)."""
        rows = [self._seen[index][0] for index in self.indices]
        return torch.from_numpy(np.array(rows, np.float32).reshape(-1, len(self.classes)))

    @property
    def labels(self) -> Tensor:
        """In the order of `indices`. Shape: int64 (M,)."""
        return torch.tensor([self._seen[index][1] for index in self.indices], dtype=torch.int64)

    def worst(self, count: int = 24) -> list[int]:
        """The wrongly classified images the model was surest of, surest first."""
        indices = self.indices
        return [indices[row] for row in worst_mistakes(self.logits, self.labels, count)]

    def report(self) -> ClassificationReport:
        """Every figure, from all images seen so far."""
        return classification_report(self.logits, self.labels, self.classes)


def worst_mistakes(logits: Tensor, labels: Tensor, count: int = 24) -> list[int]:
    """The wrongly classified images the model was surest of, surest first.

    Shape: logits (M, K), labels (M,) -> at most `count` row numbers.
    """
    confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:count].tolist()


def prediction_sheet(
    images: Sequence[Image.Image], logits: Tensor, labels: Sequence[int], classes: Sequence[str]
) -> Image.Image:
    """Images with what the model says of them: green where right, red with the truth where wrong."""
    captions, colors = [], []
    for probabilities, label in zip(logits.float().softmax(dim=1), labels, strict=True):
        predicted = int(probabilities.argmax())
        said = f"{classes[predicted]} {probabilities[predicted]:.0%}"
        captions.append([said, "" if predicted == label else f"is {classes[label]}"])
        colors.append(GREEN if predicted == label else RED)
    return contact_sheet(images, captions, colors)
