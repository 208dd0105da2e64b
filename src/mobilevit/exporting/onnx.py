"""ONNX, for ONNX Runtime on servers, desktops, phones and in browsers, and for other programs that read it.

Nodes are named after the modules they come from, as in "model.layer3.1.fusion.conv/Conv"; the name of a node that
belongs to no module, such as those that decode boxes or enlarge logits, starts with "/".
"""

from __future__ import annotations

import ast
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mobilevit.exporting.graph import Plan
from mobilevit.exporting.quantization import is_below
from mobilevit.exporting.rewrites import in_steps
from mobilevit.results.base import Array
from mobilevit.results.detection import IOU_THRESHOLD, MAX_DETECTIONS, SCORE_THRESHOLD

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_OPSET = 18
"""The oldest that PyTorch's exporter writes without conversion, and that all maintained runtimes read."""

_QUANTIZED = ("Conv", "Gemm", "MatMul", "Sigmoid", "Mul", "Relu", "Concat")


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, one file with its weights and with the artifact's description in its metadata.

    Inputs and outputs are float32 in fp16, too. int8 is expressed by QDQ nodes, calibrated on `plan.calibration`.
    """
    import onnx

    model = to_proto(plan)
    if plan.artifact.precision == "int8":
        model = _quantize(model, plan)
    elif plan.artifact.precision == "fp16":
        model = _halve(model)
    if "selected" in plan.artifact.outputs:
        _append_nms(model)
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = "mobilevit", plan.artifact.to_json()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def to_proto(plan: Plan, *, stepwise: bool = True) -> ModelProto:
    """Convert the graph in float32 and name its nodes after modules; `stepwise` writes out attention by `in_steps`."""
    exported = torch.onnx.export(
        plan.program(in_steps(plan.graph) if stepwise else None),
        input_names=[plan.graph.input_name],
        output_names=list(plan.graph.output_names),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    model: ModelProto = exported.model_proto  # made anew whenever it is asked for
    _name_nodes(model)
    return model


def _name_nodes(model: ModelProto) -> None:
    """Name every node MODULE/OPERATOR, and drop the exporter's other notes on it.

    Stack traces, with folders of the machine that exported, would be an eighth of an XXS file.
    """
    modules: dict[str, str] = {}  # by output
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" in told:
            module = ast.literal_eval(told["pkg.torch.onnx.name_scopes"])[-2]  # the last is the node itself
        else:  # made by an optimization; belongs to the module of its input
            module = next((modules[name] for name in node.input if name in modules), "")
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        modules.update(dict.fromkeys(node.output, module))
        del node.metadata_props[:]
    for part in (model.graph.value_info, model.graph.input, model.graph.output, model.graph.initializer):
        for value in part:
            del value.metadata_props[:]
    del model.graph.metadata_props[:]


def _quantize(model: ModelProto, plan: Plan) -> ModelProto:
    """Quantize convolutions, what activates or joins them, and linear layers.

    Ranges are from the smallest to the largest value, as percentiles cost 0.8 to 1.4 % top-1. The settings were chosen
    on flowers (864 held out), by the share of images that keep their class, and by milliseconds for one image (XXS, one
    thread of a Zen 4).
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = ({plan.graph.input_name: batch.numpy()} for batch in plan.batches())
    with tempfile.TemporaryDirectory() as aside:
        prepared, quantized = Path(aside) / "prepared.onnx", Path(aside) / "quantized.onnx"
        # Symbolic shapes, and linear layers as Gemm, which int8 computes faster than MatMul and Add.
        quant_pre_process(model, str(prepared), auto_merge=True)
        quantize_static(
            str(prepared),
            str(quantized),
            SimpleNamespace(get_next=partial(next, images, None)),
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_quantize=_quantizable(onnx.load(prepared), plan.in_float),
            per_channel=True,
            reduce_range=True,  # 7 of 8 bits, as processors without VNNI would overflow: 99.1 %; with 8 bits 98.4 %
            activation_type=QuantType.QUInt8,  # 3.2 ms at 128, where int8 takes 5.6
            weight_type=QuantType.QInt8,
            calibration_providers=["CPUExecutionProvider"],
            # Linear layers give float, as attention, LayerNorm and sums are float: 36 dB instead of 33.
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(quantized)


def _quantizable(model: ModelProto, floats: Sequence[str]) -> list[str]:
    """List the nodes to compute in int8: layers, what activates a convolution's output, and what joins maps for one."""
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if _module_of(node) and not is_below(_module_of(node), floats)]
    layers = [n for n in nodes if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in weights]
    convolved = {node.output[0] for node in layers if node.op_type == "Conv"}
    # SiLU is x * sigmoid(x); after a convolution in int8 it takes less time in int8, too: 12.8 instead of 14.3 ms.
    convolved |= {node.output[0] for node in nodes if node.op_type == "Sigmoid" and node.input[0] in convolved}
    read_by_convolutions = {node.input[0] for node in layers if node.op_type == "Conv"}
    names = [node.name for node in layers]
    for node in nodes:
        activates = node.op_type in ("Sigmoid", "Mul", "Relu") and not convolved.isdisjoint(node.input)
        joins = node.op_type == "Concat" and node.output[0] in read_by_convolutions
        if activates or joins:
            names.append(node.name)
    return names


def _module_of(node: NodeProto) -> str:
    return node.name.partition("/")[0]


def _halve(model: ModelProto) -> ModelProto:
    """Convert to float16, except for means and for nodes that belong to no module.

    In float16, boxes would move by an eighth of a pixel, and the sums behind the mean and the variance of a large map,
    which MobileViTv2's norm takes, too, can exceed 65504.
    LayerNorm is defined to compute in float32 (its stash_type), and softmax subtracts the largest value, so neither
    overflows.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    halved: ModelProto = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=["ReduceMean", "InstanceNormalization"],
        node_block_list=[node.name for node in model.graph.node if node.name.startswith("/")],
    )
    OnnxModel(halved).topological_sort()  # it has put the casts last
    return halved


def _append_nms(model: ModelProto) -> None:
    """Add an output "selected" (M, 3), int64: image, class and anchor of each box that suppression keeps.

    Boxes and scores stay outputs, to be looked up by these. `NonMaxSuppression` wants pairs of corners, in either order
    of axes, and scores class by class.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    limits: dict[str, Array] = {
        "nms_most": np.array([MAX_DETECTIONS], np.int64),
        "nms_iou": np.array([IOU_THRESHOLD], np.float32),
        "nms_score": np.array([SCORE_THRESHOLD], np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in limits.items())
    inputs = ["boxes_xyxy", "scores_by_class", *limits]
    graph.node.extend(
        [
            helper.make_node("Transpose", ["scores"], ["scores_by_class"], perm=[0, 2, 1], name="nms_transpose"),
            helper.make_node("NonMaxSuppression", inputs, ["selected"], name="nms"),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, ["num_selected", 3]))
