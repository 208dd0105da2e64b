"""Classification: its data, loss and evaluation.

K classes, B images in a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.errors import MobileViTError, some
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.results.classification import ClassificationResult
from mobilevit.tasks.classification_report import ClassificationMeter
from mobilevit.tasks.task import Objective, Task, TrainingSettings
from mobilevit.tasks.transforms import ClassificationTransform, mix_transform


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


class ClassificationTask(Task[int, int]):
    """Predict the class of an image; targets are indices of classes."""

    name = "classification"
    result_type = ClassificationResult
    score_name = "top1"
    score_title = "top-1"
    limits = "It answers with one of its classes whatever it is shown."
    usage = "result.top(3)"
    counted = "images"
    needs_all_classes = True

    def check_classes(self, origin: str, classes: Sequence[str], targets: Sequence[int]) -> None:
        empty = [name for name, count in zip(classes, self.count(targets, len(classes)), strict=True) if not count]
        if empty:
            raise MobileViTError(f"{origin}: no images of {some(empty)}; add some or remove the class")
        if len(classes) < 2:
            raise MobileViTError(
                f"{origin}: only one class ({classes[0]}); a classifier needs two or more, one sub-folder each"
            )

    def count(self, targets: Sequence[int], num_classes: int) -> list[int]:
        counts = Counter(targets)
        return [counts[index] for index in range(num_classes)]

    def stratum(self, target: int, _: Sequence[int]) -> int:
        return target

    def describe_target(self, target: int, classes: Sequence[str]) -> str:
        return classes[target]

    def relabel(self, target: int, new: NDArray[np.int64]) -> int:
        return int(new[target])

    def draw_target(
        self, target: int, image: Image.Image, scale: float, classes: Sequence[str]
    ) -> tuple[Image.Image, set[int]]:
        return image, {target}

    def caption(self, target: int, classes: Sequence[str]) -> list[str]:
        return [classes[target]]

    def objective(
        self,
        settings: TrainingSettings,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        targets: Sequence[int],
        device: torch.device,
    ) -> Objective:
        own = settings.classification
        class_weights = None
        if own.class_weights == "balanced":
            class_weights = balanced_class_weights(targets, num_classes).to(device)
        return Objective(
            transform=ClassificationTransform(preprocessing=preprocessing, settings=own, flip=settings.flip),
            collate=torch.tensor,
            loss=partial(classification_loss, label_smoothing=own.label_smoothing, class_weights=class_weights),
            mix=mix_transform(num_classes, mixup=own.mixup, cutmix=own.cutmix),
        )

    def head(self, settings: TrainingSettings) -> None:
        """Leave the head to the weights."""

    def read_truth(self, target: int, _: tuple[int, int]) -> int:
        return target

    def new_meter(self, classes: Sequence[str]) -> ClassificationMeter:
        return ClassificationMeter(classes)


CLASSIFICATION = ClassificationTask()
