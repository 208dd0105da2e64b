"""Attention written out in single steps, for engines that find them by their pattern."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from mobilevit.exporting.graph import ExportGraph
from mobilevit.models.mobilevit import Attention, TransformerLayer


class AttentionInSteps(nn.Module):
    """Attention as products and softmax, each factor turned once, from where the projection has put it.

    From `scaled_dot_product_attention`, the ONNX exporter makes a product that turns the keys twice; and OpenVINO
    computes these turns inside the products. One to four percent of the time, in float32.

    Shape: (batch, N, D) -> (batch, N, D).
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.scale == 1, "fuse the model first"
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads, width = self.num_heads, self.head_dim
        q, k, v = (part.reshape(batch, tokens, heads, width) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)).softmax(dim=-1)  # (batch, h, N, N)
        x = weights @ v.permute(0, 2, 1, 3)  # (batch, h, N, D / h)
        x = self.out(x.permute(0, 2, 1, 3).reshape(batch, tokens, heads * width))
        return x


def in_steps(graph: ExportGraph) -> ExportGraph:
    """A copy whose modules keep their names."""
    graph = copy.deepcopy(graph)
    for module in graph.modules():
        if isinstance(module, TransformerLayer):
            module.attention = AttentionInSteps(module.attention)  # type: ignore[assignment]
    return graph
