"""Classification: the loss, and the typed result of a prediction.

K classes, B images in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.imaging.drawing import save_image, with_caption


def classification_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy, averaged over the batch (arXiv:1512.00567 for label smoothing).

    Shape: logits (B, K); targets (B,) class numbers, or (B, K) shares after MixUp or CutMix -> scalar, in float32.
    """
    return F.cross_entropy(logits.float(), targets, weight=class_weights, label_smoothing=label_smoothing)


def balanced_class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights that make every class count the same: images / (classes * images of the class). Shape: (K,)."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes).clamp(min=1)
    return len(labels) / (num_classes * counts.float())


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """What a model says of one image."""

    source: str
    """The image's file, or what it was called."""
    classes: tuple[str, ...] = field(repr=False)
    probabilities: np.ndarray
    """float32 (K,), summing to one."""
    image: Image.Image = field(repr=False)
    """The upright RGB image, as read."""

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
        """The image above its `k` best labels; written to `path` if given."""
        drawn = with_caption(self.image, [f"{label}  {probability:.1%}" for label, probability in self.top(k)])
        if path is not None:
            save_image(drawn, path)
        return drawn

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """Plain values for JSON."""
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in self.top(k)]
        return {"source": self.source, "label": self.label, "probability": round(self.probability, 6), "top": top}
