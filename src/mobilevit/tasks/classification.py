"""Loss of classification.

K classes, B images in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
