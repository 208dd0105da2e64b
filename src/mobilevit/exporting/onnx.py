"""ONNX, for ONNX Runtime on servers, desktops, phones and in browsers, and for whatever else reads it.

Nodes are named after the modules they come from, as in "model.layer3.1.fusion.conv/Conv"; what belongs to no module of
the model, such as decoding boxes or enlarging logits, starts with "/".
"""

from __future__ import annotations

import ast
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobilevit.exporting.onnx_nms import append_nms
from mobilevit.exporting.plan import Plan
from mobilevit.exporting.quantization import float_modules, is_below
from mobilevit.exporting.steps import in_steps

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OPSET = 18
"""The oldest that PyTorch's exporter writes without conversion, and that all maintained runtimes read."""

_QUANTIZED = ("Conv", "Gemm", "MatMul", "Sigmoid", "Mul", "Relu", "Concat")


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, one file with its weights, and the artifact's description in its metadata.

    fp16 takes and gives float32, as the other precisions do. int8 are QDQ nodes, calibrated on `plan.calibration`.

    Raises:
        ValueError: the packages are not installed, or `plan.keep_float` names what is not in the graph.
    """
    import onnx

    floats = float_modules(plan)
    model = to_proto(plan)
    if plan.artifact.precision == "int8":
        model = _quantize(model, floats, plan)
    elif plan.artifact.precision == "fp16":
        model = _halve(model)
    if "selected" in plan.artifact.outputs:
        append_nms(model)
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = "mobilevit", plan.artifact.to_json()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def to_proto(plan: Plan, *, stepwise: bool = True) -> ModelProto:
    """The graph in float32, its nodes named after modules.

    Args:
        plan: gives graph and input.
        stepwise: write out attention, see `in_steps`.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            plan.program(in_steps(plan.graph) if stepwise else None),
            input_names=[plan.graph.input_name],
            output_names=list(plan.graph.output_names),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model: ModelProto = exported.model_proto  # made anew whenever it is asked for
    _name_nodes(model)
    return model


def _name_nodes(model: ModelProto) -> None:
    """Call every node MODULE/OPERATOR, and drop what the exporter tells of it beyond that.

    Stack traces, with folders of the machine that exported, are an eighth of an XXS file otherwise.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    modules: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" in told:
            module = ast.literal_eval(told["pkg.torch.onnx.name_scopes"])[-2]  # the last is the node itself
        else:  # made by an optimization; belongs to where its input is from
            module = next((modules[producers[name].name] for name in node.input if name in producers), "")
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        modules[node.name] = module
        del node.metadata_props[:]
    for part in (model.graph.value_info, model.graph.input, model.graph.output, model.graph.initializer):
        for value in part:
            del value.metadata_props[:]
    del model.graph.metadata_props[:]


class _Batches:
    """Calibration images as ONNX Runtime asks for them."""

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self._name, self._batches = name, batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.numpy()}


def _quantize(model: ModelProto, floats: Sequence[str], plan: Plan) -> ModelProto:
    """Convolutions and linear layers in int8; how was chosen on flowers (top-1 0.726 before, 864 held out).

    Share of images that keep their class, or milliseconds of one image at 256 (XXS, one thread of a Zen 4):

        ranges         smallest and largest value of all images, as nothing is then cut off: top-1 0.727, 98.5 %;
                       percentiles 99.999 and 99.99: top-1 0.713 and 0.719; entropy finds the same ranges as min/max
        activations    uint8: 3.2 ms at 128, where int8 takes 5.6; symmetric int8 has a bit less for SiLU's outputs,
                       95.6 instead of 96.4 % with all of the model in int8
        weights        7 of 8 bits, per channel: processors without VNNI add pairs of products in 16 bits, which 8 bits
                       overflow. Costs nothing: 99.1 % where 8 bits give 98.4 %, and equal mean IoU
        SiLU           in int8 after a convolution in int8: 12.8 ms where float takes 14.3, as its ends are conversions
        linear layers  int8 in, float out, as what follows (attention, LayerNorm, sums) is float: 10.3 instead of
                       10.9 ms, and logits of 36 instead of 33 dB
        attention      products of activations in float: in int8 they are no faster
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared, quantized = Path(aside) / "prepared.onnx", Path(aside) / "quantized.onnx"
        # Symbolic shapes, and linear layers as Gemm, which int8 computes faster than MatMul and Add.
        quant_pre_process(model, str(prepared), auto_merge=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Batches(plan.graph.input_name, plan.batches()),
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_quantize=_quantizable(onnx.load(prepared), floats),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibration_providers=["CPUExecutionProvider"],
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(quantized)


def _quantizable(model: ModelProto, floats: Sequence[str]) -> list[str]:
    """Names of the nodes to compute in int8."""
    weights = {tensor.name for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def allowed(node: NodeProto) -> bool:
        module = node.name.partition("/")[0]
        return bool(module) and not is_below(module, floats)

    layers = [
        node
        for node in model.graph.node
        if allowed(node) and node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]
    convolutions = {node.name for node in layers if node.op_type == "Conv"}
    names = [node.name for node in layers]
    for node in model.graph.node:
        sources = [producers[name] for name in node.input if name in producers]
        sources += [producers[node.input[0]] for node in sources if node.op_type == "Sigmoid"]  # x * sigmoid(x)
        activates = node.op_type in ("Sigmoid", "Mul", "Relu") and any(s.name in convolutions for s in sources)
        joins = node.op_type == "Concat" and any(n.name in convolutions for n in consumers.get(node.output[0], []))
        if allowed(node) and (activates or joins):
            names.append(node.name)
    return names


def _halve(model: ModelProto) -> ModelProto:
    """The model in float16, but for what belongs to no module, and for means.

    Boxes would move by an eighth of a pixel, and a mean over a large map is a sum beyond 65504 first. LayerNorm is
    defined to compute in float32 (its stash_type), and softmax subtracts the largest value, so neither overflows.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below the smallest float16, which become that
        halved: ModelProto = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=["ReduceMean"],
            node_block_list=[node.name for node in model.graph.node if node.name.startswith("/")],
        )
    OnnxModel(halved).topological_sort()  # the casts came last
    return halved
