"""An experiment for GPUs: attention heads widened by zeros to a width that kernels like."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from mobilevit.models.mobilevit import Attention

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def pad_heads(model: Model, multiple: int = 8) -> Model:
    """Make a copy whose attention heads are widened by zeros to a multiple of some width, which changes no result.

    Attention kernels of GPUs read heads in pieces of 16 bytes: 8 numbers of 16 bits. S has heads of 36 and 60, XXS of
    20, XS of 30 and 36; for these PyTorch pads queries, keys and values in every forward pass, or takes a slower
    kernel. On a CPU this gains nothing.

    Args:
        model: fused, as the scale of attention must no longer follow from the width of a head.
        multiple: each head's width becomes a multiple of this.
    """
    assert getattr(model, "fused", False), "fuse the model first"
    padded = copy.deepcopy(model)
    for module in padded.modules():
        if isinstance(module, Attention):
            heads, missing = module.num_heads, -module.head_dim % multiple
            qkv, out = module.qkv, module.out
            qkv.weight = _frozen(_widen(qkv.weight, 3 * heads, missing, axis=0))
            qkv.bias = _frozen(_widen(qkv.bias, 3 * heads, missing, axis=0))
            out.weight = _frozen(_widen(out.weight, heads, missing, axis=1))
            module.head_dim += missing
    return padded


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _widen(tensor: Tensor, heads: int, missing: int, *, axis: int) -> Tensor:
    """Put zeros behind each of the `heads` equal parts of an axis."""
    shape = list(tensor.shape)
    parts = tensor.reshape(*shape[:axis], heads, -1, *shape[axis + 1 :])
    shape = list(parts.shape)
    shape[axis + 1] = missing
    return torch.cat([parts, parts.new_zeros(shape)], dim=axis + 1).flatten(axis, axis + 1)
