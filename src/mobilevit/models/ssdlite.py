"""SSDLite on a MobileViT: detection in one pass (arXiv:1512.02325, arXiv:1801.04381, arXiv:2110.02178).

Letters used in shape comments:

    B  images in the batch     A  anchors in all levels together
    K  classes of objects        H, W  height and width of an image or map

Boxes are relative to the image, 0..1, so that one set of anchors serves all input sizes of one aspect ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import Backbone, ConvNormAct


@dataclass(frozen=True, kw_only=True)
class SSDLiteConfig:
    """Levels and anchors; the defaults are the published ones (official code, arXiv:2110.02178 section 4.2).

    Raises:
        MobileViTError: the levels' settings differ in number.
    """

    extra_channels: tuple[int, ...] = (256, 128, 128)
    """Channels of the levels after the backbone's; each has half the size of the one before."""
    pool_channels: int = 64
    """Channels of the last level, a single cell that sees the whole image."""
    head_channels: tuple[int | None, ...] = (512, 256, None, None, None, None)
    """Channels each level has in its head, by a projection where it has others; None: as it is."""
    min_scale: float = 0.1
    """Side of the smallest anchors, relative to the image."""
    max_scale: float = 1.05
    """Side of the anchors that a further level would have."""
    aspect_ratios: tuple[tuple[float, ...], ...] = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))
    """Aspect ratios of the anchors of each level, besides 1; each also inverted."""

    def __post_init__(self) -> None:
        levels = 2 + len(self.extra_channels) + 1
        if len(self.head_channels) != levels or len(self.aspect_ratios) != levels:
            raise MobileViTError(f"{levels} levels need as many head_channels and aspect_ratios")

    @property
    def anchors_per_cell(self) -> tuple[int, ...]:
        """Anchors in a cell of each level: a square, a larger square, and two for every ratio."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)


class DetectionOutput(NamedTuple):
    """The output of `SSDLite` for B images."""

    class_logits: Tensor
    """(B, A, K + 1); class 0 is the background."""
    box_regression: Tensor
    """(B, A, 4): how far each anchor is moved and scaled; see `decode_boxes`."""
    anchors_cxcywh: Tensor
    """(A, 4): center, width and height in 0..1."""

    def named(self) -> dict[str, Tensor]:
        """Boxes and probabilities at every anchor, in float32, as sessions and exported files give them.

        Shape: "boxes_xyxy" (B, A, 4), in 0..1 of the input, beyond it for cut-off objects; "scores" (B, A, K), without
        the background's.
        """
        return {
            "boxes_xyxy": decode_boxes(self.box_regression.float(), self.anchors_cxcywh),
            "scores": self.class_logits.float().softmax(dim=2)[..., 1:],
        }


CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
"""Units of the regression, chosen so that its values are around 1."""


def make_anchors(map_sizes: Sequence[tuple[int, int]], config: SSDLiteConfig) -> Tensor:
    """Make the boxes that detection starts from: several at every cell of every level's map, clipped to 0..1.

    Shape: (height, width) of each level's map -> (A, 4), center and size; level by level, row by row, cell by cell.
    """
    return torch.tensor(_anchor_table(tuple(map_sizes), config))


@lru_cache(maxsize=16)
def _anchor_table(map_sizes: tuple[tuple[int, int], ...], config: SSDLiteConfig) -> NDArray[np.float32]:
    levels = []
    step = (config.max_scale - config.min_scale) / len(map_sizes)
    scales = pairwise(config.min_scale + number * step for number in range(len(map_sizes) + 1))
    for (height, width), ratios, (small, large) in zip(map_sizes, config.aspect_ratios, scales, strict=True):
        between = math.sqrt(small * large)
        sides = [(small, small), (between, between)]
        for root in map(math.sqrt, ratios):
            sides += [(small * root, small / root), (small / root, small * root)]
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        centers = np.stack([x, y], axis=-1).reshape(-1, 1, 2).repeat(len(sides), axis=1)
        levels.append(np.concatenate([centers, np.broadcast_to(sides, centers.shape)], axis=-1).reshape(-1, 4))
    return np.concatenate(levels).clip(0, 1).astype(np.float32)


def encode_boxes(boxes_cxcywh: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Compute the regression that turns anchors into boxes (arXiv:1512.02325, equation 2): inverse of `decode_boxes`.

    Shape: (..., A, 4) and (A, 4), both in 0..1 -> (..., A, 4).
    """
    center = (boxes_cxcywh[..., :2] - anchors_cxcywh[..., :2]) / (CENTER_VARIANCE * anchors_cxcywh[..., 2:])
    size = (boxes_cxcywh[..., 2:] / anchors_cxcywh[..., 2:]).log() / SIZE_VARIANCE
    return torch.cat([center, size], dim=-1)


def decode_boxes(box_regression: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Move and scale anchors by the regression.

    Shape: (..., A, 4) and (A, 4) -> (..., A, 4) as left, top, right, bottom; in 0..1, beyond it for cut-off objects.
    """
    center = anchors_cxcywh[..., :2] + CENTER_VARIANCE * anchors_cxcywh[..., 2:] * box_regression[..., :2]
    half = anchors_cxcywh[..., 2:] * (SIZE_VARIANCE * box_regression[..., 2:]).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


class SSDLite(nn.Module):
    """A backbone, further maps made from its deepest one, and a head for classes and boxes on each of six levels.

    K is `num_classes`, without the background.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> `DetectionOutput`.

    Raises:
        MobileViTError: the backbone has no maps at strides 16 and 32.
    """

    card: ModelCard
    """Name, task, classes and preprocessing; set by `create_model` and `load`."""

    def __init__(self, backbone: Backbone, num_classes: int, config: SSDLiteConfig | None = None) -> None:
        super().__init__()
        if not {16, 32} <= backbone.feature_channels.keys():
            raise MobileViTError(
                f"`output_stride` is {backbone.config.output_stride}; detection needs maps at strides 16 and 32, so "
                "leave it out"
            )
        self.backbone = backbone
        self.config = backbone.config
        self.num_classes = num_classes
        self.head_config = config = config or SSDLiteConfig()
        # As in the official code, depthwise convolutions of the heads have BatchNorm and no activation.
        levels = [backbone.feature_channels[16], backbone.feature_channels[32]]

        self.extra = nn.ModuleList()
        for channels in config.extra_channels:
            self.extra.append(_separable(levels[-1], channels, stride=2))
            levels.append(channels)
        self.pool = ConvNormAct(levels[-1], config.pool_channels, 1, norm=False, act="relu")
        levels.append(config.pool_channels)

        self.heads = nn.ModuleList()
        for channels, head_channels, anchors in zip(levels, config.head_channels, config.anchors_per_cell, strict=True):
            last = len(self.heads) == len(levels) - 1
            self.heads.append(DetectionHead(channels, head_channels, anchors, num_classes + 1, separable=not last))
        for part in (self.extra, self.pool, self.heads):
            backbone.initialize_detection(part)
        for head in self.heads:
            assert isinstance(head, DetectionHead)
            backbone.initialize_prediction(head.predict)

    def forward(self, x: Tensor) -> DetectionOutput:
        features = self.backbone.forward_features(x)
        maps = [features[16], features[32]]  # (B, C4, H / 16, W / 16), (B, C5, H / 32, W / 32)
        for shrink in self.extra:
            maps.append(shrink(maps[-1]))  # strides 64, 128, 256
        maps.append(self.pool(maps[-1].mean((2, 3), keepdim=True)))  # (B, 64, 1, 1)

        levels = [head(level) for head, level in zip(self.heads, maps, strict=True)]  # (B, cells * anchors, 4 + K + 1)
        outputs = torch.cat(levels, dim=1)
        box_regression, class_logits = outputs[..., :4], outputs[..., 4:]
        anchors = make_anchors([(level.shape[2], level.shape[3]) for level in maps], self.head_config)
        anchors = anchors.to(x.device, non_blocking=x.device.type == "cuda")  # without waiting for the GPU
        return DetectionOutput(class_logits, box_regression, anchors)


class DetectionHead(nn.Module):
    """Classes and boxes at every anchor of one level.

    Shape: (B, C, H, W) -> (B, H * W * num_anchors, 4 + num_outputs), boxes first.
    """

    def __init__(
        self, channels: int, head_channels: int | None, num_anchors: int, num_outputs: int, *, separable: bool
    ) -> None:
        super().__init__()
        self.width = 4 + num_outputs
        self.project: nn.Module = nn.Identity()
        if head_channels not in (None, channels):
            self.project = ConvNormAct(channels, head_channels, 1, act="relu")
            channels = head_channels
        self.depthwise: nn.Module = nn.Identity()
        if separable:
            self.depthwise = ConvNormAct(channels, channels, 3, groups=channels, act=None)
        self.predict = nn.Conv2d(channels, num_anchors * self.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.predict(self.depthwise(self.project(x)))  # (B, anchors * (4 + K + 1), H, W)
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.width)


def _separable(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    """A 3x3 convolution of each channel, then a 1x1 across them (arXiv:1704.04861)."""
    return nn.Sequential(
        ConvNormAct(in_channels, in_channels, 3, stride=stride, groups=in_channels, act=None),
        ConvNormAct(in_channels, out_channels, 1, act="relu"),
    )
