"""Loss of segmentation.

B images in a batch, K classes, H and W an image's height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mobilevit.class_names import IGNORE
from mobilevit.models.deeplabv3 import SegmentationOutput


def segmentation_loss(
    output: SegmentationOutput, label_maps: Tensor, *, aux_weight: float = 0.4, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every pixel that is not ignored, and of the auxiliary head where there is one.

    Shape: label_maps (B, H, W) of class numbers and `IGNORE` -> scalar, in float32. A batch of ignored pixels alone has
    the loss 0.
    """
    targets = label_maps.long()
    counted = (targets != IGNORE).any()
    loss = F.cross_entropy(output.logits.float(), targets, weight=class_weights, ignore_index=IGNORE)
    if output.aux_logits is not None:
        aux = F.cross_entropy(output.aux_logits.float(), targets, weight=class_weights, ignore_index=IGNORE)
        loss = loss + aux_weight * aux
    return torch.where(counted, loss, output.logits.float().sum() * 0)


def most_at_once(num_classes: int, size: tuple[int, int]) -> int:
    """Images whose logits, (num_classes, *size) each, take a quarter of a gigabyte together; at least one."""
    return max(1, 2**26 // (num_classes * size[0] * size[1]))
