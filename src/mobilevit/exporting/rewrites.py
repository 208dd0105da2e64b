"""Modules that compute the same as the model's own, in a form that an engine or its converter handles better."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mobilevit.exporting.graph import ExportGraph
from mobilevit.models.deeplabv3 import ASPP
from mobilevit.models.mobilevit import Attention, TransformerLayer


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


def in_steps(graph: ExportGraph) -> ExportGraph:
    """Copy a graph and write out its attention; modules keep their names."""
    graph = copy.deepcopy(graph)
    for module in graph.modules():
        if isinstance(module, TransformerLayer):
            module.attention = AttentionInSteps(module.attention)  # type: ignore[assignment]
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
