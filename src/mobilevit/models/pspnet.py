"""PSPNet on a MobileViT: the class of every pixel (arXiv:1612.01105, arXiv:2206.02680).

Letters in shape comments are those of `mobilevit.models.segmenter`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import Backbone, ConvNormAct
from mobilevit.models.segmenter import Segmenter, published_aux_channels


@dataclass(frozen=True, kw_only=True)
class PSPNetConfig:
    """Width and pools of the head; the defaults are the published ones.

    Raises:
        MobileViTError: a width or number of cells below one.
    """

    channels: int = 512
    """Channels after the pools are joined with the map."""
    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Cells on a side of each pool."""
    dropout: float = 0.1
    """Dropout before the classifier."""
    aux_head: bool = False
    """Add a small second classifier on the map of layer4, which helps training and is not used afterwards."""
    aux_channels: int | None = None
    """Channels of the auxiliary head; published: a quarter of layer4's, 128 or more."""

    def __post_init__(self) -> None:
        if min(self.channels, self.aux_channels or 1, *self.bins) < 1 or self.aux_channels == 0:
            raise MobileViTError("`channels`, `aux_channels` and `bins` must be 1 or more")


class PyramidPooling(nn.Module):
    """Pools of several sizes beside the map: each a 1x1 on a coarse grid, enlarged again; a 3x3 joins all.

    Pooling and enlarging are linear in rows and in columns, so both are products with small matrices, which every
    engine computes alike; many have no pool whose cells overlap.

    Shape: (B, C, h, w) -> (B, channels, h, w).
    """

    def __init__(self, in_channels: int, config: PSPNetConfig) -> None:
        super().__init__()
        self.bins = config.bins
        width = in_channels // 4 // 16 * 16
        self.pools = nn.ModuleList(ConvNormAct(in_channels, width, 1, act="relu") for _ in config.bins)
        self.project = ConvNormAct(in_channels + len(config.bins) * width, config.channels, 3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for bins, pool in zip(self.bins, self.pools, strict=True):
            (shrink_rows, enlarge_rows), (shrink_columns, enlarge_columns) = (
                [_like(x, matrix) for matrix in _grid(int(side), bins)] for side in x.shape[2:]
            )
            cells = pool(shrink_rows @ x @ shrink_columns.T)  # (B, C / 4, bins, bins)
            maps.append(enlarge_rows @ cells @ enlarge_columns.T)
        x = self.project(torch.cat(maps, dim=1))
        return x


@lru_cache(maxsize=64)
def _grid(side: int, bins: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Make the matrix that averages a line of pixels in cells, and the one that enlarges cells, ends on ends.

    Shape: (bins, side) and (side, bins). Cells overlap by a pixel where `bins` does not divide `side`, as in PyTorch.
    """
    shrink = np.zeros((bins, side), np.float32)
    for cell in range(bins):
        first, last = cell * side // bins, -(-(cell + 1) * side // bins)
        shrink[cell, first:last] = 1 / (last - first)
    places = np.linspace(0, bins - 1, side)[:, None]
    enlarge = np.maximum(0, 1 - np.abs(places - np.arange(bins))).astype(np.float32)
    return shrink, enlarge


def _like(x: Tensor, matrix: NDArray[np.float32]) -> Tensor:
    return torch.tensor(matrix, dtype=x.dtype).to(x.device, non_blocking=True)


class PSPNet(Segmenter):
    """A segmenter with pyramid pooling, which compares every pixel with the whole and with parts of it."""

    def __init__(self, backbone: Backbone, num_classes: int, config: PSPNetConfig | None = None) -> None:
        super().__init__(backbone, num_classes)
        config = config or PSPNetConfig()
        aux_channels = config.aux_channels or published_aux_channels(backbone)
        self.head_config = config = replace(config, aux_channels=aux_channels)
        self.psp = PyramidPooling(backbone.feature_channels[self.output_stride], config)
        self._add_classifiers(
            self.psp,
            channels=config.channels,
            dropout=config.dropout,
            aux_channels=aux_channels if config.aux_head else None,
        )

    def context(self, x: Tensor) -> Tensor:
        """Look around. Shape: (B, C, h, w) -> (B, channels, h, w)."""
        x = self.psp(x)
        return x
