"""Modules that compute the same as the model's own, in a form that an engine or its converter handles better."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.exporting.graph import ExportGraph
from mobilevit.models.deeplabv3 import ASPP
from mobilevit.models.mobilevit import Attention, TransformerLayer
from mobilevit.models.mobilevitv2 import GlobalNorm, MobileViTv2Block, SeparableLayer


class AttentionInSteps(nn.Module):
    """Attention as products and a softmax, each factor transposed once. Shape: (batch, N, D) -> (batch, N, D).

    From `scaled_dot_product_attention`, the ONNX exporter makes a product that transposes the keys twice, which costs
    one to four percent of the time in float32. `factors` pass through queries, keys, values and probabilities, so that
    hooks can observe or round these.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.scale == 1, "fuse the model first"
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.out = attention.qkv, attention.out
        self.factors = nn.ModuleList(nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads, width = self.num_heads, self.head_dim
        query, key, value, probability = self.factors
        q, k, v = (part.reshape(batch, tokens, heads, width) for part in self.qkv(x).chunk(3, dim=-1))
        scores = query(q).permute(0, 2, 1, 3) @ key(k).permute(0, 2, 3, 1)  # (batch, h, N, N)
        x = probability(scores.softmax(dim=-1)) @ value(v).permute(0, 2, 1, 3)  # (batch, h, N, D / h)
        out: Tensor = self.out(x.permute(0, 2, 1, 3).reshape(batch, tokens, heads * width))
        return out


class SeparableLayerInRows(nn.Module):
    """`SeparableLayer` on tables with a row for each token. Shape: (B, P, N, D) -> (B, P, N, D).

    ONNX Runtime reshapes before and after a product of anything else; XNNPACK has no softmax along other dimensions.
    """

    def __init__(self, layer: SeparableLayer, norm: type[GlobalNormByInstance]) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norm(layer.attention_norm), norm(layer.ffn_norm)
        self.attention, self.ffn_in, self.ffn_out = layer.attention, layer.ffn_in, layer.ffn_out
        self.ffn_act = nn.SiLU()  # not in place

    def forward(self, x: Tensor) -> Tensor:
        (batch, offsets, _, width), attention = x.shape, self.attention
        y = self.attention_norm(x).view(batch * offsets, -1, width)  # (B * P, N, D)
        rows = y.view(-1, width)  # (B * P * N, D)
        scores = attention.query(rows).view(batch * offsets, 1, -1).softmax(dim=-1)  # (B * P, 1, N)
        context = attention.key(torch.bmm(scores, y).view(-1, width)).view(batch * offsets, 1, width)
        rows = (F.relu(attention.value(rows)).view_as(y) * context).view_as(rows)
        x = x + attention.out(rows).view_as(x)
        rows = self.ffn_norm(x).view_as(rows)
        x = x + self.ffn_out(self.ffn_act(self.ffn_in(rows))).view_as(x)
        return x


class GlobalNormByInstance(nn.Module):
    """`GlobalNorm` as ONNX's own operator; PyTorch's over groups would become five. Shape: (B, P, N, D) -> the same."""

    def __init__(self, norm: GlobalNorm) -> None:
        super().__init__()
        assert not norm.affine, "fuse the model first"
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x.view(x.shape[0], 1, -1), eps=self.eps).view_as(x)


class GlobalNormByMeans(GlobalNormByInstance):
    """`GlobalNorm` as two means of a map, for engines that have no such norm. Shape: (B, P, N, D) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 1, -1, x.shape[3])  # (B, 1, P * N, D)
        y = y - y.mean((2, 3), keepdim=True)
        y = y * torch.rsqrt((y * y).mean((2, 3), keepdim=True) + self.eps)
        return y.view_as(x)


def separable_in_rows(block: MobileViTv2Block, norm: type[GlobalNormByInstance]) -> None:
    """Rewrite the layers of a block and all its norms, in place; layers with weights keep their names."""
    layers = cast(Iterable[SeparableLayer], block.transformer)
    block.transformer = nn.Sequential(*(SeparableLayerInRows(layer, norm) for layer in layers))
    block.norm = norm(block.norm)  # type: ignore[assignment]


def in_steps(graph: ExportGraph) -> ExportGraph:
    """Copy a graph and write out its attention; layers with weights keep their names."""
    graph = copy.deepcopy(graph)
    for module in list(graph.modules()):
        if isinstance(module, TransformerLayer):
            module.attention = AttentionInSteps(module.attention)  # type: ignore[assignment]
        elif isinstance(module, MobileViTv2Block):
            separable_in_rows(module, GlobalNormByInstance)
    return graph


class SplitASPP(nn.Module):
    """ASPP whose last convolution is divided in two, so that the pooled branch need not be expanded to a map.

    ExecuTorch would copy it to every pixel; LiteRT's converter makes an invalid file of it.
    """

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        self.near, self.atrous, self.pool = aspp.near, aspp.atrous, aspp.pool
        conv, width = aspp.project.conv, aspp.pool.conv.out_channels
        assert conv.bias is not None, "fuse the model first"
        self.project = nn.Conv2d(conv.in_channels - width, conv.out_channels, 1)
        self.project_whole = nn.Conv2d(width, conv.out_channels, 1, bias=False)
        set_weights(self.project, conv.weight[:, :-width], conv.bias)
        set_weights(self.project_whole, conv.weight[:, -width:], None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.near(x), *(branch(x) for branch in self.atrous)]
        whole = self.project_whole(self.pool(x.mean((2, 3), keepdim=True)))  # (B, aspp_channels, 1, 1)
        x = self.act(self.project(torch.cat(branches, dim=1)) + whole)
        return x


def set_weights(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer copies of these numbers, contiguous and in float32."""
    layer.weight = nn.Parameter(weight.detach().float().contiguous().clone(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
