"""ExecuTorch: phones and boards, computing on their processors through XNNPACK.

XNNPACK has no norms, no attention and no broadcasting of maps. ExecuTorch computes these by plain loops, and copies
everything to and fro; so the graph is first rewritten into operators that XNNPACK has. XXS at 256 x 256 then takes
13 ms on one core instead of 53, and a single call does it all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from mobilevit.exporting.graph import ExportGraph, Plan, SegmentationGraph
from mobilevit.exporting.quantization import is_below
from mobilevit.exporting.rewrites import GlobalNormByMeans, SplitASPP, separable_in_rows, set_weights
from mobilevit.models.deeplabv3 import DeepLabv3
from mobilevit.models.mobilevit import Attention, ConvNormAct, MobileViTBlock, TransformerLayer
from mobilevit.models.mobilevitv2 import MobileViTv2Block

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

_aten = torch.ops.aten


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, one file with its weights and with the artifact's description as a method."""
    path.write_bytes(lower(plan).to_executorch().buffer)


def lower(plan: Plan) -> EdgeProgramManager:
    """Convert the graph for ExecuTorch, and hand all of it that XNNPACK takes over to that."""
    from executorch import exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    module = plan.program(_suited(plan.graph)).module(check_guards=False)
    _simplify(module)
    if plan.artifact.precision == "int8":
        module = _quantize(module, plan)
    with torch.no_grad():
        program = torch.export.export(module, (plan.example,), strict=False)
    return exir.to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        constant_methods={"mobilevit": plan.artifact.to_json()},
    )


class _SuitedGraph(nn.Module):
    """The whole graph, for the same input and outputs."""

    def __init__(self, graph: ExportGraph) -> None:
        super().__init__()
        self.whole = graph
        self.columns: Tensor | None
        columns = graph.columns if isinstance(graph, SegmentationGraph) else None
        self.register_buffer("columns", None if columns is None else columns.T.contiguous())  # (W, w)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        graph, x = self.whole, images
        if graph.baked:
            # First into float, which XNNPACK can transpose.
            x = x.float().permute(0, 3, 1, 2) * graph.scale + graph.shift
        if not isinstance(graph, SegmentationGraph):
            return graph.answer(x)
        # As linear layers, whose second factor is constant, and rows before columns: then only small maps are turned.
        rows, columns = graph.rows, self.columns
        assert rows is not None, "files for ExecuTorch have one size"
        assert columns is not None
        coarse = graph.model.coarse_logits(x)  # (B, K, h, w)
        batch, classes, height, width = coarse.shape
        lines = coarse.transpose(2, 3).reshape(batch * classes * width, height)
        lines = F.linear(lines, rows).view(batch, classes, width, -1).transpose(2, 3).reshape(-1, width)
        return graph.finish(F.linear(lines, columns).view(batch, classes, len(rows), -1))  # from (B, K, H, W)


class _RootMeanSquareNorm(nn.Module):
    """LayerNorm without gain and shift, of numbers whose mean is zero. Shape: (batch, N, D) -> (batch, N, D).

    The mean of squares is a linear layer with one output, as XNNPACK averages maps only.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        assert not norm.elementwise_affine, "fuse the model first"
        (width,) = norm.normalized_shape
        self.eps = norm.eps
        self.average: Tensor
        self.register_buffer("average", torch.full((1, width), 1 / width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps)


class _SplitAttention(nn.Module):
    """Attention in single steps, with queries, keys and values from three linear layers.

    PyTorch's own decomposition would also scale both factors, and copy the parts of the fused projection.
    Shape: (batch, N, D) -> (batch, N, D).
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.scale == 1, "fuse the model first"
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv = nn.ModuleDict()
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            self.qkv[name] = linear = nn.Linear(weight.shape[1], weight.shape[0])
            set_weights(linear, weight, bias)
        self.out = attention.out

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads, width = self.num_heads, self.head_dim
        q, k, v = (linear(x).view(batch, tokens, heads, width) for linear in self.qkv.values())
        q = q.permute(0, 2, 1, 3).reshape(batch * heads, tokens, width)
        k = k.permute(0, 2, 3, 1).reshape(batch * heads, width, tokens)
        v = v.permute(0, 2, 1, 3).reshape(batch * heads, tokens, width)
        x = torch.bmm(torch.bmm(q, k).softmax(dim=-1), v)
        x = x.view(batch, heads, tokens, width).permute(0, 2, 1, 3).reshape(batch, tokens, heads * width)
        out: Tensor = self.out(x)
        return out


@torch.no_grad()
def _suited(graph: ExportGraph) -> _SuitedGraph:
    """Copy a graph so that it computes the same by operators of XNNPACK; modules keep their names.

    The tokens that a transformer passes from layer to layer are only read by LayerNorm, which subtracts their mean. So
    the layers that write them can leave out the mean, in their weights, and LayerNorm need not compute it.
    """
    graph = copy.deepcopy(graph).to(memory_format=torch.contiguous_format)  # other weights are refused
    for module in list(graph.modules()):
        if isinstance(module, ConvNormAct) and isinstance(module.act, nn.SiLU | nn.ReLU):
            module.act.inplace = False
        elif isinstance(module, MobileViTBlock):
            _leave_out_mean(module.project_in.conv)
            module.norm = _RootMeanSquareNorm(module.norm)  # type: ignore[assignment]
            for layer in cast(Sequence[TransformerLayer], module.transformer):
                _leave_out_mean(layer.attention.out)
                _leave_out_mean(layer.ffn_out)
                layer.attention_norm = _RootMeanSquareNorm(layer.attention_norm)  # type: ignore[assignment]
                layer.ffn_norm = _RootMeanSquareNorm(layer.ffn_norm)  # type: ignore[assignment]
                layer.attention = _SplitAttention(layer.attention)  # type: ignore[assignment]
                layer.ffn_act.inplace = False
        elif isinstance(module, MobileViTv2Block):
            separable_in_rows(module, GlobalNormByMeans)
        elif isinstance(module, DeepLabv3):
            module.aspp = SplitASPP(module.aspp)  # type: ignore[assignment]
    return _SuitedGraph(graph).eval()


def _leave_out_mean(layer: nn.Linear | nn.Conv2d) -> None:
    weight, bias = layer.weight.double(), layer.bias
    set_weights(layer, weight - weight.mean(dim=0), None if bias is None else bias.double() - bias.double().mean())


def _simplify(module: GraphModule) -> None:
    """Remove operators that do nothing but would be computed outside XNNPACK, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.contiguous.default or _changes_no_type(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is _aten.mean.dim and len(node.args) == 2:
            # XNNPACK averages maps to maps of one pixel.
            with graph.inserting_after(node):
                flat = graph.call_function(_aten.view.default, (node, list(node.meta["val"].shape)))
            flat.meta = dict(node.meta)
            for user in [user for user in node.users if user is not flat]:
                user.replace_input_with(node, flat)
            node.args = (*node.args, True)
    graph.eliminate_dead_code()
    module.recompile()


def _changes_no_type(node: Node) -> bool:
    if node.op != "call_function" or not str(node.target).startswith("aten.to."):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return bool(node.meta["val"].dtype == source.meta["val"].dtype)


def _quantize(module: GraphModule, plan: Plan) -> GraphModule:
    """Quantize convolutions, linear layers and concatenations between convolutions, weights per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import quantize_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    quantizer = XNNPACKQuantizer()
    for operator in (_aten.conv2d.default, _aten.linear.default, _aten.cat.default):
        quantizer.set_operator_type(operator, config)
    quantizer.set_filter_function(lambda node: _is_quantized(node, plan.in_float))
    prepared = quantize_pt2e.prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for batch in plan.batches():
            prepared(batch)
    return cast(GraphModule, quantize_pt2e.convert_pt2e(prepared))


def _is_quantized(node: Node, floats: Sequence[str]) -> bool:
    if node.op != "call_function":
        return True  # a weight; the layer that uses it decides
    stack = [("", ""), *node.meta.get("nn_module_stack", {}).values()]
    name, kind = stack[-1][0].removeprefix("whole").removeprefix("."), stack[-1][1].rpartition(".")[2]
    if node.target is _aten.cat.default:
        return kind in ("SplitASPP", "MobileViTBlock")  # between convolutions; elsewhere it would only convert
    return kind not in ("_RootMeanSquareNorm", "_SuitedGraph", "") and not is_below(name, floats)
