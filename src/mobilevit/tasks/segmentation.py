"""Segmentation: its data, loss and evaluation.

B images in a batch, K classes, H and W an image's height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.class_names import IGNORE
from mobilevit.errors import MobileViTError
from mobilevit.imaging.drawing import background, draw_label_map
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.pspnet import PSPNetConfig
from mobilevit.models.segmenter import SegmentationOutput
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.tasks.segmentation_report import SegmentationMeter
from mobilevit.tasks.targets import Mask
from mobilevit.tasks.task import Objective, Task, TrainingSettings
from mobilevit.tasks.transforms import SegmentationTransform


def segmentation_loss(output: SegmentationOutput, label_maps: Tensor, *, aux_weight: float = 0.4) -> Tensor:
    """Cross-entropy of every pixel that is not ignored, and of the auxiliary head where there is one.

    Shape: label_maps (B, H, W) of class numbers and `IGNORE` -> scalar, in float32. A batch of ignored pixels alone has
    the loss 0.
    """
    targets = label_maps.long()
    counted = (targets != IGNORE).any()
    loss = F.cross_entropy(output.logits.float(), targets, ignore_index=IGNORE)
    if output.aux_logits is not None:
        aux = F.cross_entropy(output.aux_logits.float(), targets, ignore_index=IGNORE)
        loss = loss + aux_weight * aux
    return torch.where(counted, loss, output.logits.float().sum() * 0)


class SegmentationTask(Task[Mask, NDArray[np.uint8]]):
    """Predict the class of every pixel; targets are masks."""

    name = "segmentation"
    result_type = SegmentationResult
    score_name = "miou"
    score_title = "mean IoU"
    limits = "Every pixel is given one of its classes, whatever is there."
    usage = "result.describe()"
    counted = "pixels (images)"
    most_in_legend = IGNORE

    def check_classes(self, origin: str, classes: Sequence[str], _: Sequence[Mask]) -> None:
        if len(classes) < 2:
            raise MobileViTError(f"{origin}: only one class ({classes[0]}); segmentation needs two or more")
        if len(classes) > IGNORE:
            raise MobileViTError(f"{origin}: {len(classes)} classes; masks of bytes have room for {IGNORE}")

    def describe_target(self, target: Mask, classes: Sequence[str]) -> str:
        return f"{target.path.name} {classes} {target.class_of.hex()}"

    def relabel(self, target: Mask, new: NDArray[np.int64]) -> Mask:
        return replace(target, class_of=bytes(v if v == IGNORE else int(new[v]) for v in target.class_of))

    def draw_target(
        self, target: Mask, image: Image.Image, scale: float, classes: Sequence[str]
    ) -> tuple[Image.Image, set[int]]:
        label_map = np.asarray(Image.fromarray(target.read()).resize(image.size, Image.Resampling.NEAREST))
        labels = set(np.unique(label_map).tolist()) - {IGNORE, *background(classes)}
        return draw_label_map(image, label_map, classes), labels

    def objective(
        self,
        settings: TrainingSettings,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        targets: Sequence[Mask],
        device: torch.device,
    ) -> Objective:
        return Objective(
            transform=SegmentationTransform(
                preprocessing=preprocessing,
                settings=settings.segmentation,
                crop_size=settings.training_size,
                flip=settings.flip,
                photometric_distortion=settings.photometric_distortion,
            ),
            collate=torch.stack,
            loss=partial(segmentation_loss, aux_weight=settings.segmentation.aux_weight),
        )

    def head(self, settings: TrainingSettings) -> DeepLabv3Config | PSPNetConfig | None:
        """Kind, width and auxiliary head as the settings say; None if they say nothing."""
        own = settings.segmentation
        if own.head is None and own.aspp_channels is None and not own.aux_head:
            return None
        if own.head == "pspnet":
            return PSPNetConfig(aux_head=own.aux_head)
        return DeepLabv3Config(aspp_channels=own.aspp_channels, aux_head=own.aux_head)

    def read_truth(self, target: Mask, size: tuple[int, int]) -> NDArray[np.uint8]:
        return target.read(size)

    def new_meter(self, classes: Sequence[str]) -> SegmentationMeter:
        return SegmentationMeter(classes)


SEGMENTATION = SegmentationTask()
