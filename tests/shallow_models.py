"""Models that converters are done with sooner."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mobilevit.models.mobilevit import MobileViTBlock
from mobilevit.models.mobilevitv2 import MobileViTv2Block

M = TypeVar("M", bound=nn.Module)


def shallow(model: M) -> M:
    """Leave one transformer layer in each block, in place: the same operators in half the graph."""
    for module in model.modules():
        if isinstance(module, MobileViTBlock | MobileViTv2Block):
            del module.transformer[1:]
    return model
