"""DeepLabv3 on a MobileViT: the class of every pixel (arXiv:1706.05587, arXiv:2110.02178).

Letters in shape comments are those of `mobilevit.models.segmenter`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import Backbone, ConvNormAct
from mobilevit.models.segmenter import Segmenter, published_aux_channels


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
            aux_channels=published_aux_channels(backbone),
        ).scaled(16 / backbone.config.output_stride)
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(published, **given)


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


class DeepLabv3(Segmenter):
    """A segmenter with ASPP, which sees near, far and the whole."""

    def __init__(self, backbone: Backbone, num_classes: int, config: DeepLabv3Config | None = None) -> None:
        super().__init__(backbone, num_classes)
        self.head_config = config = (config or DeepLabv3Config()).published_for(backbone)
        assert config.aspp_channels is not None
        self.aspp = ASPP(backbone.feature_channels[self.output_stride], config)
        aux_channels = config.aux_channels if config.aux_head else None
        self._add_classifiers(
            self.aspp, channels=config.aspp_channels, dropout=config.dropout, aux_channels=aux_channels
        )

    def context(self, x: Tensor) -> Tensor:
        """Look around. Shape: (B, C, h, w) -> (B, aspp_channels, h, w)."""
        x = self.aspp(x)
        return x
