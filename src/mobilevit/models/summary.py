"""Layers of a model at any input size: shapes, parameters, multiply-adds, and the cost of attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mobilevit.models import Model
from mobilevit.models.deeplabv3 import ASPP
from mobilevit.models.mobilevit import Backbone, MobileViTBlock, whole_patches
from mobilevit.models.mobilevitv2 import MobileViTv2Block
from mobilevit.models.pspnet import PyramidPooling


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the table."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Shape of the output without the batch; () for layers that only training uses."""
    parameters: int
    macs: int
    """Multiply-adds of convolutions, linear layers and attention, for one image."""
    activations: int
    """Numbers in the output."""


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """Cost of comparing tokens in a block: for MobileViT, one product of queries and keys.

    Sources: arXiv:2110.02178, section 3.1; arXiv:2206.02680, section 3.
    """

    name: str
    map_size: tuple[int, int]
    """(H, W) of the feature map, resized up to a multiple of the patch."""
    patch_size: tuple[int, int]
    num_sequences: int
    """P: pixels in a patch."""
    num_tokens: int
    """N: patches in the map."""
    embed_dim: int
    plain_cost_per_channel: int
    """(H W)^2: every pixel attends to every pixel. Times D for multiply-adds."""
    cost_per_channel: int
    """P N^2: every pixel attends to those at its own offset."""
    separable_cost_per_channel: int | None
    """P N: every pixel is compared with the query that all share; None for MobileViT, which compares pixels."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole model at one input size."""

    input_size: tuple[int, int]
    layers: tuple[LayerRow, ...]
    attention: tuple[AttentionRow, ...]
    parameters: int
    macs: int
    activations: int


def summarize(model: Model, input_size: tuple[int, int]) -> Summary:
    """Measure a model without computing: a copy of it runs on tensors that have shapes but no values."""
    model = copy.deepcopy(model).to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in _layers(model):
        module.register_forward_hook(lambda _module, _in, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    counter = FlopCounterMode(display=False, depth=3)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, *input_size, device="meta"))
    counts = counter.get_flop_counts()
    layers = tuple(
        LayerRow(
            name=name,
            kind=type(module).__name__,
            shape=shapes.get(name, ()),
            parameters=sum(p.numel() for p in module.parameters()),
            macs=sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) // 2,
            activations=math.prod(shapes[name]) if name in shapes else 0,
        )
        for name, module in _layers(model)
    )
    attention = tuple(
        _attention(name, module, shapes[name])
        for name, module in _layers(model)
        if isinstance(module, MobileViTBlock | MobileViTv2Block)
    )
    return Summary(
        input_size=input_size,
        layers=layers,
        attention=attention,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        activations=sum(row.activations for row in layers),
    )


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk through the stem, every block of every stage, and the parts of the head."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList | Backbone | ASPP | PyramidPooling):
            yield from _layers(child, f"{prefix}{name}.")
        elif not isinstance(child, nn.Dropout | nn.Dropout2d):
            yield f"{prefix}{name}", child


def _attention(name: str, block: MobileViTBlock | MobileViTv2Block, shape: tuple[int, ...]) -> AttentionRow:
    (ph, pw), separable = block.patch_size, isinstance(block, MobileViTv2Block)
    height, width = whole_patches(shape[1], shape[2], block.patch_size)
    num_sequences, num_tokens = ph * pw, (height // ph) * (width // pw)
    return AttentionRow(
        name=name,
        map_size=(height, width),
        patch_size=(ph, pw),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        embed_dim=block.project_in.conv.out_channels,
        plain_cost_per_channel=(height * width) ** 2,
        cost_per_channel=num_sequences * num_tokens**2,
        separable_cost_per_channel=num_sequences * num_tokens if separable else None,
    )
