"""What each task trains for: how images are varied, what the targets of a batch are, and what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import Transform
from mobilevit.data.transforms import (
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    collate_boxes,
    mix_transform,
)
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.classification import balanced_class_weights, classification_loss
from mobilevit.tasks.detection import detection_loss
from mobilevit.tasks.segmentation import segmentation_loss
from mobilevit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the training loop asks of a task."""

    transform: Transform
    """Of every training image and its target."""
    collate: Callable[[Sequence[Any]], Any]
    """Targets of single images -> those of a batch."""
    loss: Callable[[Any, Any], Tensor]
    """The model's outputs and a batch's targets -> a scalar in float32."""
    mix: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None
    """Changes a whole batch and its targets, on the device, before the model sees it."""


def make_objective(
    config: TrainConfig, data: ImageSet[Any], preprocessing: Preprocessing, device: torch.device
) -> Objective:
    """What the data's task trains for, as the settings say."""
    if data.task == "detection":
        return _detection(config, preprocessing)
    if data.task == "segmentation":
        return _segmentation(config, preprocessing)
    return _classification(config, data, preprocessing, device)


def _classification(
    config: TrainConfig, data: ImageSet[int], preprocessing: Preprocessing, device: torch.device
) -> Objective:
    class_weights = None
    settings = config.classification
    if settings.class_weights == "balanced":
        class_weights = balanced_class_weights(data.targets, len(data.classes)).to(device)
    return Objective(
        transform=ClassificationTransform(
            preprocessing=preprocessing,
            min_crop_area=settings.min_crop_area,
            flip=config.flip,
            randaugment=settings.randaugment,
            random_erasing=settings.random_erasing,
        ),
        collate=torch.tensor,
        loss=partial(classification_loss, label_smoothing=settings.label_smoothing, class_weights=class_weights),
        mix=mix_transform(len(data.classes), mixup=settings.mixup, cutmix=settings.cutmix),
    )


def _detection(config: TrainConfig, preprocessing: Preprocessing) -> Objective:
    return Objective(
        transform=DetectionTransform(
            preprocessing=preprocessing,
            zoom_out=config.detection.zoom_out,
            iou_crop=config.detection.iou_crop,
            flip=config.flip,
            photometric_distortion=config.photometric_distortion,
        ),
        collate=collate_boxes,
        loss=lambda outputs, targets: detection_loss(outputs, targets.boxes_cxcywh, targets.labels),
    )


def _segmentation(config: TrainConfig, preprocessing: Preprocessing) -> Objective:
    return Objective(
        transform=SegmentationTransform(
            preprocessing=preprocessing,
            crop_size=config.training_size,
            scale_range=config.segmentation.scale_range,
            flip=config.flip,
            rotation=config.segmentation.rotation,
            photometric_distortion=config.photometric_distortion,
        ),
        collate=_stack,
        loss=partial(segmentation_loss, aux_weight=config.segmentation.aux_weight),
    )


def _stack(label_maps: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(label_maps))
