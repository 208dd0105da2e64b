"""Rewrite a model for inference: the same function in fewer steps.

BatchNorm and the affine part of other norms are linear, so a neighboring linear layer can take them over:

    BatchNorm after a convolution        -> the convolution's weight and bias
    gain and shift of any other norm     -> the linear layers (or the 1x1 convolution) that follow
    1 / sqrt(head_dim) on the attention  -> the rows of the projection that make queries

MobileViTv2's norm goes over whole images, so only its gain and shift can move; mean and variance remain.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from mobilevit.models.mobilevit import Attention, ConvNormAct, MobileViTBlock, TransformerLayer
from mobilevit.models.mobilevitv2 import GlobalNorm, MobileViTv2Block, SeparableLayer

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fuse(model: Model) -> Model:
    """Make a faster, eval-only copy that computes the same numbers; the original stays as it is.

    Works on any model made of this package's blocks. Outputs differ by float rounding, below 1e-4 in float32.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    if getattr(model, "fused", False):
        return fused
    for module in fused.modules():
        if isinstance(module, ConvNormAct):
            _fold_batch_norm(module)
        elif isinstance(module, TransformerLayer):
            _fold_affine(module.attention_norm, module.attention.qkv)
            _fold_affine(module.ffn_norm, module.ffn_in)
            _fold_attention_scale(module.attention)
            module.ffn_act = nn.SiLU(inplace=True)
        elif isinstance(module, SeparableLayer):
            attention = module.attention
            _fold_affine(module.attention_norm, attention.query, attention.key, attention.value)
            _fold_affine(module.ffn_norm, module.ffn_in)
            module.ffn_act = nn.SiLU(inplace=True)
    for module in fused.modules():  # after the BatchNorms: these convolutions have a bias by now
        if isinstance(module, MobileViTBlock | MobileViTv2Block):
            _fold_affine(module.norm, module.project_out.conv)
    fused.fused = True  # type: ignore[assignment]
    return fused.to(memory_format=torch.channels_last)


def _fold_batch_norm(block: ConvNormAct) -> None:
    if isinstance(block.norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        conv, norm = block.conv, block.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        _set(
            conv,
            conv.weight.double() * gain[:, None, None, None],
            norm.bias.double() - norm.running_mean.double() * gain,
        )
        block.norm = nn.Identity()
    if isinstance(block.act, nn.SiLU | nn.ReLU):
        block.act = type(block.act)(inplace=True)  # nothing else reads the output of a convolution


def _fold_affine(norm: nn.LayerNorm | GlobalNorm, *following: nn.Linear | nn.Conv2d) -> None:
    """Use that following(gain * x + shift) = (W * gain) x + (W shift + bias).

    A bilinear resize between the two does not matter: it is linear, and its weights sum to one. Nor does a weighted sum
    of tokens whose weights sum to one.
    """
    gain, shift = norm.weight.double(), norm.bias.double()
    for layer in following:
        assert layer.bias is not None
        weight = layer.weight.double()
        bias = weight.flatten(1) @ shift + layer.bias.double()
        _set(layer, weight * gain.view(1, -1, *(1,) * (weight.ndim - 2)), bias)
    if isinstance(norm, nn.LayerNorm):
        norm.elementwise_affine = False
    else:
        norm.affine = False
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


def _fold_attention_scale(attention: Attention) -> None:
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    queries = slice(0, attention.out.in_features)
    weight[queries] *= attention.scale
    bias[queries] *= attention.scale
    _set(attention.qkv, weight, bias)
    attention.scale = 1.0


def _set(module: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    dtype = module.weight.dtype
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
