"""DeepLabv3 on a MobileViT: the class of every pixel (arXiv:1706.05587, arXiv:2110.02178).

Letters used in shape comments:

    B  images in the batch     C  channels of the backbone's last map     K  classes, background included
    H, W  height and width of the input     h, w  of the backbone's last map: H / output_stride, W / output_stride
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import Backbone, ConvNormAct, initialize_prediction


@dataclass(frozen=True, kw_only=True)
class DeepLabv3Config:
    """Width and dilations of the head; None: as published for the backbone and its output stride.

    Raises:
        MobileViTError: a rate or width below one.
    """

    aspp_channels: int | None = None
    """Channels of each branch; published: 256 on MobileViT, also 512 in later weights, 512 on MobileViTv2."""
    atrous_rates: tuple[int, ...] | None = None
    """Dilations of the 3x3 branches; published: 6, 12, 18, and twice these at output stride 8."""
    dropout: float = 0.1
    """Dropout before the classifier."""
    aux_head: bool = False
    """Add a small second classifier on the map of layer4, which helps training and is not used afterwards."""
    aux_channels: int | None = None
    """Channels of the auxiliary head; published: a quarter of layer4's, 128 or more."""

    def __post_init__(self) -> None:
        numbers = (self.aspp_channels, self.aux_channels, *(self.atrous_rates or ()))
        if any(number is not None and number < 1 for number in numbers):
            raise MobileViTError("`aspp_channels`, `aux_channels` and `atrous_rates` must be 1 or more")

    def scaled(self, ratio: float) -> DeepLabv3Config:
        """Adapt dilations to a map `ratio` times as large on each side (arXiv:1706.05587, section 4.1)."""
        rates = self.atrous_rates
        return self if rates is None else replace(self, atrous_rates=tuple(max(int(r * ratio), 1) for r in rates))

    def published_for(self, backbone: Backbone) -> DeepLabv3Config:
        """Fill in what is None."""
        published = DeepLabv3Config(
            aspp_channels=backbone.aspp_channels,
            atrous_rates=(6, 12, 18),
            aux_channels=max(backbone.config.channels[-2] // 4, 128),
        ).scaled(16 / backbone.config.output_stride)
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(published, **given)


class SegmentationOutput(NamedTuple):
    """The output of `DeepLabv3` for B images."""

    logits: Tensor
    """(B, K, H, W), at the size of the input."""
    aux_logits: Tensor | None
    """(B, K, H, W) of the auxiliary head; None unless the model has one and is in training mode."""

    def named(self) -> dict[str, Tensor]:
        """The outputs as sessions and exported files give them: "logits" (B, K, H, W)."""
        return {"logits": self.logits}


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, dilated 3x3s and global pooling side by side.

    Shape: (B, C, h, w) -> (B, aspp_channels, h, w).
    """

    def __init__(self, in_channels: int, config: DeepLabv3Config) -> None:
        super().__init__()
        width, rates = config.aspp_channels, config.atrous_rates
        assert width is not None
        assert rates is not None
        self.near = ConvNormAct(in_channels, width, 1, act="relu")
        self.atrous = nn.ModuleList(ConvNormAct(in_channels, width, 3, dilation=rate, act="relu") for rate in rates)
        self.pool = ConvNormAct(in_channels, width, 1, act="relu")
        self.project = ConvNormAct((2 + len(rates)) * width, width, 1, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.near(x), *(branch(x) for branch in self.atrous)]
        whole = self.pool(x.mean((2, 3), keepdim=True))  # (B, aspp_channels, 1, 1)
        x = self.project(torch.cat([*branches, whole.expand_as(branches[0])], dim=1))
        return x


class DeepLabv3(nn.Module):
    """A backbone, ASPP on its last map, and a classifier whose logits are resized to the input.

    K is `num_classes`, background included if there is one.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> `SegmentationOutput`.
    """

    card: ModelCard
    """Name, task, classes and preprocessing; set by `create_model` and `load`."""

    def __init__(self, backbone: Backbone, num_classes: int, config: DeepLabv3Config | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.num_classes = num_classes
        self.output_stride = max(backbone.feature_channels)
        self.head_config = config = (config or DeepLabv3Config()).published_for(backbone)
        assert config.aspp_channels is not None
        assert config.aux_channels is not None
        self.aspp = ASPP(backbone.feature_channels[self.output_stride], config)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(config.aspp_channels, num_classes, 1)
        self.aux_head = None
        if config.aux_head:
            aux_conv = ConvNormAct(backbone.config.channels[-2], config.aux_channels, 3, act="relu")
            aux_classifier = nn.Conv2d(config.aux_channels, num_classes, 1)
            self.aux_head = nn.Sequential(aux_conv, nn.Dropout2d(config.dropout), aux_classifier)
        backbone.initialize(self.aspp)
        initialize_prediction(self.classifier)
        if self.aux_head is not None:
            backbone.initialize(self.aux_head)
            initialize_prediction(aux_classifier)

    def forward(self, x: Tensor) -> SegmentationOutput:
        size = (x.shape[2], x.shape[3])
        if not (self.training and self.aux_head is not None):
            return SegmentationOutput(_resize(self.coarse_logits(x), size), None)
        *_, penultimate, last = self.backbone.forward_stages(x)
        aux_logits = _resize(self.aux_head(penultimate), size)  # (B, K, H, W)
        return SegmentationOutput(_resize(self._classify(last), size), aux_logits)

    def coarse_logits(self, x: Tensor) -> Tensor:
        """Compute the logits before they are resized. Shape: (B, 3, H, W) -> (B, K, h, w)."""
        return self._classify(self.backbone.forward_features(x)[self.output_stride])

    def _classify(self, x: Tensor) -> Tensor:
        """Shape: (B, C, h, w) -> (B, K, h, w)."""
        x = self.classifier(self.dropout(self.aspp(x)))
        return x


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, with corners aligned as in the official code."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
