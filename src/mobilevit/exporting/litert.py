"""LiteRT (TensorFlow Lite): Android, iOS and small boards, on the processor through XNNPACK."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.errors import MobileViTError
from mobilevit.exporting.graph import Plan
from mobilevit.exporting.quantization import is_below
from mobilevit.exporting.rewrites import GlobalNormByMeans, SplitASPP, separable_in_rows
from mobilevit.models.deeplabv3 import ASPP
from mobilevit.models.mobilevitv2 import MobileViTv2Block

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import ModelT

_WITH_WEIGHTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_FOLLOWING = ("LOGISTIC", "MUL", "ADD", "CONCATENATION", "PAD")
"""Operators that compute in int8 where all their inputs do. Softmax and LayerNorm are not among them: they lose too
much in int8, and XNNPACK has no int8 kernels for their parts."""


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, a .tflite file of one input and of outputs in the graph's order.

    In fp16, weights have half the size, and computation is in float32. In int8, convolutions and the operators that
    follow them compute with activations of 8 bits, calibrated on `plan.calibration`; the transformers' linear layers
    find the range of their input in every run. LayerNorm, softmax and the products of attention stay in float32.
    """
    import litert_torch

    graph = _rewrite(plan.graph)
    with torch.no_grad():
        content = bytes(litert_torch.convert(graph, (plan.example,)).model_content())
    path.write_bytes(content if plan.artifact.precision == "fp32" else _quantize(content, graph, plan))


class _LayerNorm(nn.Module):
    """LayerNorm in half as many operators as the converter's own. Shape: (batch, N, D) -> (batch, N, D)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


def _rewrite(graph: nn.Module) -> nn.Module:
    """Copy a graph in a form that the converter handles well."""
    graph = copy.deepcopy(graph)
    for module in list(graph.modules()):
        if isinstance(module, MobileViTv2Block):
            separable_in_rows(module, GlobalNormByMeans)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _LayerNorm(child))
            elif isinstance(child, ASPP):
                setattr(module, name, SplitASPP(child))
    # The converter knows constants by the addresses of contiguous copies, which it frees too early: of two weights
    # of one shape that are not contiguous, one could silently stand for both.
    for tensor in [*graph.parameters(), *graph.buffers()]:
        tensor.data = tensor.data.contiguous().clone(memory_format=torch.contiguous_format)
    return graph


def _quantize(content: bytes, graph: nn.Module, plan: Plan) -> bytes:
    """Let the quantizer treat each operator by its mode, which it reads from the names of the operator's outputs."""
    from ai_edge_litert.tools import flatbuffer_utils
    from ai_edge_quantizer import quantizer as aeq

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    subgraph = model.subgraphs[0]
    kinds = [flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) for operator in subgraph.operators]
    modes = _modes(model, kinds, graph, plan)
    for number, (operator, mode) in enumerate(zip(subgraph.operators, modes, strict=True)):
        for index in operator.outputs:
            # The converter's own names are a tenth of a small file; only those of the graph's outputs are needed.
            if mode != "float" or index not in subgraph.outputs:
                subgraph.tensors[index].name = f"{mode}/{number}/{kinds[number].lower()}/{index}".encode()
    quantizer = aeq.Quantizer(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    for mode, name in sorted(set(zip(modes, kinds, strict=True))):
        if mode == "float":
            continue
        kind = aeq.qtyping.TFLOperationName(name)
        if mode == "fp16":
            casting = aeq.AlgorithmName.FLOAT_CASTING
            quantizer.add_weight_only_config("^fp16/", kind, num_bits=16, algorithm_key=casting)
        elif mode == "dynamic":
            quantizer.add_dynamic_config("^dynamic/", kind, num_bits=8)
        else:
            quantizer.add_static_config("^int8/", kind, activation_num_bits=8, weight_num_bits=8)
    signature = model.signatureDefs[0]
    (name,) = (entry.name.decode() for entry in signature.inputs)
    images = {signature.signatureKey.decode(): [{name: batch.numpy()} for batch in plan.batches()]}
    return bytes(quantizer.quantize(quantizer.calibrate(images)).quantized_model)


def _modes(model: ModelT, kinds: Sequence[str], graph: nn.Module, plan: Plan) -> list[str]:
    """Decide how each operator computes: "float", "fp16" (weights only), "int8", or "dynamic" (int8 with own ranges).

    Raises:
        MobileViTError: no operator has the weights of a module of the graph.
    """
    tensors, owners = model.subgraphs[0].tensors, _owners(graph)
    modes: list[str] = []
    in_int8: set[int] = set()  # activations
    num_owned = 0
    for kind, operator in zip(kinds, model.subgraphs[0].operators, strict=True):
        data = {index: model.buffers[tensors[index].buffer].data for index in operator.inputs if index >= 0}
        activations = [index for index, values in data.items() if values is None]
        weights = data[operator.inputs[1]] if kind in _WITH_WEIGHTS else None
        owner = None if weights is None else owners.get(_digest(np.asarray(weights)))
        mode = "float"
        if owner is not None:
            num_owned += 1
            if plan.artifact.precision == "fp16":
                mode = "fp16"
            elif not is_below(owner, plan.in_float):
                mode = "dynamic" if kind == "FULLY_CONNECTED" else "int8"
        elif kind in _FOLLOWING and activations and in_int8.issuperset(activations):
            mode = "int8"
        if mode == "int8":
            in_int8.update(operator.outputs)
        modes.append(mode)
    if not num_owned:
        raise MobileViTError(
            "this version of litert_torch changes weights, so layers cannot be told apart; export fp32"
        )
    return modes


def _owners(graph: nn.Module) -> dict[str, str]:
    """Name modules by the digest of their weights in the layout of the file, as it does not keep all their names."""
    owners = {}
    for name, module in graph.named_modules():
        if isinstance(module, nn.Conv2d):  # from (out, in, h, w), or (channels, 1, h, w) if depthwise
            order = (1, 2, 3, 0) if module.groups > 1 else (0, 2, 3, 1)
            owners[_digest(module.weight.detach().permute(order).numpy())] = name
        elif isinstance(module, nn.Linear):
            owners[_digest(module.weight.detach().numpy())] = name
    return owners


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
