"""Classification: loss, metrics, the typed result of a prediction, and the pictures of an evaluation.

K classes, B pictures in a batch, M pictures in an evaluation.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.files import write_atomically, write_text
from mobilevit.tasks.drawing import GREEN, RED, contact_sheet, save_image, with_caption


def classification_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy, averaged over the batch (arXiv:1512.00567 for label smoothing).

    Shape: logits (B, K); targets (B,) class numbers, or (B, K) shares after MixUp or CutMix -> scalar, in float32.
    """
    return F.cross_entropy(logits.float(), targets, weight=class_weights, label_smoothing=label_smoothing)


def balanced_class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights that make every class count the same: pictures / (classes * pictures of the class). Shape: (K,)."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes).clamp(min=1)
    return len(labels) / (num_classes * counts.float())


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """What a model says of one picture."""

    source: str
    """The picture's file, or what it was called."""
    classes: tuple[str, ...] = field(repr=False)
    probabilities: np.ndarray
    """float32 (K,), summing to one."""
    image: Image.Image = field(repr=False)
    """The upright RGB picture, as read."""

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """Its probability."""
        return float(self.probabilities.max())

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes, best first, as (label, probability)."""
        best = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[i], float(self.probabilities[i])) for i in best]

    def draw(self, path: str | os.PathLike[str] | None = None, *, k: int = 3) -> Image.Image:
        """The picture above its `k` best labels; written to `path` if given."""
        picture = with_caption(self.image, [f"{label}  {probability:.1%}" for label, probability in self.top(k)])
        if path is not None:
            save_image(picture, path)
        return picture

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """Plain values for JSON."""
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in self.top(k)]
        return {"source": self.source, "label": self.label, "probability": round(self.probability, 6), "top": top}


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """How one class fared."""

    name: str
    precision: float
    """Share of the pictures called so that are so."""
    recall: float
    """Share of the pictures that are so which are called so."""
    f1: float
    """Harmonic mean of the two."""
    support: int
    """Pictures of this class."""


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """How a model fared on labelled pictures."""

    num_images: int
    top1: float
    """Share of pictures whose most probable class is right."""
    top5: float | None
    """Share whose right class is among the five most probable; None below six classes, where it says little."""
    loss: float
    """Mean cross-entropy, without label smoothing, in nats."""
    calibration_error: float
    """Expected gap between confidence and accuracy over 15 bins (arXiv:1706.04599)."""
    per_class: tuple[ClassScores, ...]
    confusion: np.ndarray = field(repr=False)
    """int64 (K, K): rows are the true classes, columns the predicted ones."""

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name."""
        named = {"top1": self.top1, "top5": self.top5, "loss": self.loss, "calibration_error": self.calibration_error}
        return {name: round(value, 6) for name, value in named.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        per_class = [
            {k: round(v, 6) if isinstance(v, float) else v for k, v in vars(c).items()} for c in self.per_class
        ]
        return {
            "num_images": self.num_images, **self.summary, "per_class": per_class, "confusion": self.confusion.tolist(),
        }  # fmt: skip


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


def save_confusion_matrix(report: ClassificationReport, folder: Path, *, most_classes: int = 60) -> None:
    """Write `confusion_matrix.csv`, and `confusion_matrix.png` unless there are too many classes to be legible."""
    names = [scores.name for scores in report.per_class]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["true \\ predicted", *names])
    rows.writerows([name, *counts] for name, counts in zip(names, report.confusion.tolist(), strict=True))
    write_text(folder / "confusion_matrix.csv", text.getvalue())
    if len(names) > most_classes:
        return
    from matplotlib.figure import Figure

    shares = report.confusion / report.confusion.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    # A name may have $ in it, and a folder's need not be UTF-8.
    shown = [name.encode(errors="replace").decode() for name in names]
    axes.set_xticks(ticks, shown, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(ticks, shown, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=f"{report.top1:.1%} of {report.num_images:,} right")
    for (row, column), count in np.ndenumerate(report.confusion):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    write_atomically(folder / "confusion_matrix.png", lambda aside: figure.savefig(aside, dpi=120))


def worst_mistakes(logits: Tensor, labels: Tensor, count: int = 24) -> list[int]:
    """The wrongly classified pictures the model was surest of, surest first.

    Shape: logits (M, K), labels (M,) -> at most `count` row numbers.
    """
    confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True)][:count].tolist()


def prediction_sheet(
    images: Sequence[Image.Image], logits: Tensor, labels: Sequence[int], classes: Sequence[str]
) -> Image.Image:
    """Pictures with what the model says of them: green where right, red with the truth where wrong."""
    captions, colours = [], []
    for probabilities, label in zip(logits.float().softmax(dim=1), labels, strict=True):
        predicted = int(probabilities.argmax())
        said = f"{classes[predicted]} {probabilities[predicted]:.0%}"
        captions.append([said, "" if predicted == label else f"is {classes[label]}"])
        colours.append(GREEN if predicted == label else RED)
    return contact_sheet(images, captions, colours)
