"""ONNX, for ONNX Runtime on servers, desktops, phones and in browsers, and for other programs that read it.

Nodes are named after the modules they come from, as in "model.layer3.1.fusion.conv/Conv"; the name of a node that
belongs to no module, such as those that decode boxes or enlarge logits, starts with "/".
"""

from __future__ import annotations

import ast
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilevit.exporting.graph import Plan
from mobilevit.exporting.quantization import is_below
from mobilevit.exporting.rewrites import in_steps
from mobilevit.results.detection import IOU_THRESHOLD, MAX_DETECTIONS, SCORE_THRESHOLD

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OPSET = 18
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
    """Convert the graph in float32 and name its nodes after modules.

    Args:
        plan: gives graph and input.
        stepwise: write out attention, see `in_steps`.
    """
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
    """Name every node MODULE/OPERATOR, and drop the exporter's other notes on it.

    Stack traces, with folders of the machine that exported, would be an eighth of an XXS file.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    modules: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" in told:
            module = ast.literal_eval(told["pkg.torch.onnx.name_scopes"])[-2]  # the last is the node itself
        else:  # made by an optimization; belongs to the module of its input
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

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.numpy()}


def _quantize(model: ModelProto, plan: Plan) -> ModelProto:
    """Quantize convolutions and linear layers.

    The settings were chosen on flowers (top-1 0.726 before, 864 held out), by the share of images that keep their
    class, and by milliseconds for one image at 256 (XXS, one thread of a Zen 4):

        ranges         smallest and largest value of all images, so that nothing is cut off: top-1 0.727, 98.5 %;
                       percentiles 99.999 and 99.99: top-1 0.713 and 0.719; entropy finds the same ranges as min/max
        activations    uint8: 3.2 ms at 128, where int8 takes 5.6; symmetric int8 has a bit less for SiLU's outputs,
                       95.6 instead of 96.4 % with all of the model in int8
        weights        7 of 8 bits, per channel: processors without VNNI add pairs of products in 16 bits, which 8 bits
                       overflow. Costs nothing: 99.1 % where 8 bits give 98.4 %, and equal mean IoU
        SiLU           in int8 after a convolution in int8: 12.8 ms where float, with its conversions, takes 14.3
        linear layers  int8 in, float out, as attention, LayerNorm and sums are float: 10.3 instead of 10.9 ms, and
                       logits of 36 instead of 33 dB
        attention      products of activations in float: in int8 they are no faster
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as aside:
        prepared, quantized = Path(aside) / "prepared.onnx", Path(aside) / "quantized.onnx"
        # Symbolic shapes, and linear layers as Gemm, which int8 computes faster than MatMul and Add.
        quant_pre_process(model, str(prepared), auto_merge=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Batches(plan.graph.input_name, plan.batches()),
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_quantize=_quantizable(onnx.load(prepared), plan.in_float),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibration_providers=["CPUExecutionProvider"],
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(quantized)


def _quantizable(model: ModelProto, floats: Sequence[str]) -> list[str]:
    """List the nodes to compute in int8."""
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
    """Convert to float16, except for means and for nodes that belong to no module.

    In float16, boxes would move by an eighth of a pixel, and the sum behind the mean of a large map can exceed 65504.
    LayerNorm is defined to compute in float32 (its stash_type), and softmax subtracts the largest value, so neither
    overflows.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    halved: ModelProto = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=["ReduceMean"],
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
    limits: dict[str, NDArray[Any]] = {
        "nms_most": np.array([MAX_DETECTIONS], np.int64),
        "nms_iou": np.array([IOU_THRESHOLD], np.float32),
        "nms_score": np.array([SCORE_THRESHOLD], np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in limits.items())
    transposed = helper.make_node("Transpose", ["scores"], ["scores_by_class"], perm=[0, 2, 1], name="nms_transpose")
    graph.node.append(transposed)
    graph.node.append(
        helper.make_node("NonMaxSuppression", ["boxes_xyxy", "scores_by_class", *limits], ["selected"], name="nms")
    )
    graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, ["num_selected", 3]))
