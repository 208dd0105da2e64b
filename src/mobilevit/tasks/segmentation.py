"""Segmentation: loss, postprocessing, and the typed result of a prediction.

B images in a batch, K classes, H and W an image's height and width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.class_names import IGNORE
from mobilevit.imaging.drawing import class_colors, draw_label_map, save_image
from mobilevit.imaging.preprocessing import Placement
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


def to_label_map(answer: Tensor, placement: Placement) -> np.ndarray:
    """The class of every pixel of the original image.

    Logits are enlarged (bilinearly) before the best class is chosen, a band of rows at a time, so that an image of
    many megapixels needs little memory. Where a model gives classes already, pixels get that of the nearest.

    Shape: logits (K, h, w), or classes (h, w) as integers, at the size of the model's input -> uint8 (H, W).
    """
    rows, columns = placement.filled
    if answer.ndim == 2:
        small = Image.fromarray(answer[:rows, :columns].to(torch.uint8).numpy(force=True))
        return np.asarray(small.resize(placement.image[::-1], Image.Resampling.NEAREST))
    logits = answer
    logits = logits[None, :, :rows, :columns].float()  # without what was only added as a margin
    height, width = placement.image
    if (rows, columns) == (height, width):
        return logits[0].argmax(dim=0).to(torch.uint8).numpy(force=True)
    # Half-pixel centers, as `F.interpolate` has them with align_corners=False.
    source = ((torch.arange(height, device=logits.device) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    upper = source.floor().long()
    lower, weight = (upper + 1).clamp(max=rows - 1), (source - upper)[:, None]
    band = max(1, 2**24 // (logits.shape[1] * width))
    parts = []
    for begin in range(0, height, band):
        here = slice(begin, begin + band)
        mixed = torch.lerp(logits[:, :, upper[here]], logits[:, :, lower[here]], weight[here])
        wide = F.interpolate(mixed, size=(mixed.shape[2], width), mode="bilinear", align_corners=False)
        parts.append(wide[0].argmax(dim=0).to(torch.uint8))
    return torch.cat(parts).numpy(force=True)


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """The class a model gives every pixel of one image."""

    source: str
    """The image's file, or what it was called."""
    classes: tuple[str, ...] = field(repr=False)
    label_map: np.ndarray = field(repr=False)
    """uint8 (H, W): index into `classes`, at the size of the image."""
    image: Image.Image = field(repr=False)
    """The upright RGB image, as read."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, largest first."""
        counts = np.bincount(self.label_map.ravel(), minlength=len(self.classes)) / self.label_map.size
        return {self.classes[i]: float(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def draw(self, path: str | os.PathLike[str] | None = None, *, opacity: float = 0.55) -> Image.Image:
        """The image under its classes' colors, with a legend; written to `path` if given."""
        drawn = draw_label_map(self.image, self.label_map, self.classes, opacity=opacity)
        if path is not None:
            save_image(drawn, path)
        return drawn

    def mask(self) -> Image.Image:
        """The label map as a palette image: values are class numbers, colors those of `draw`."""
        mask = Image.fromarray(self.label_map).convert("P")
        mask.putpalette([channel for color in class_colors(len(self.classes)) for channel in color])
        return mask

    def save_mask(self, path: str | os.PathLike[str]) -> None:
        """Write `mask` as a PNG."""
        save_image(self.mask(), path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the label map itself is what `save_mask` writes."""
        shares = {label: round(share, 6) for label, share in self.shares.items()}
        height, width = self.label_map.shape
        return {"source": self.source, "width": width, "height": height, "shares": shares}

    def describe(self) -> str:
        """One line for people: what covers how much."""
        return "  ".join(f"{label} {share:.1%}" for label, share in self.shares.items())
