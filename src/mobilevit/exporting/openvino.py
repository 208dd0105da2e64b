"""OpenVINO IR: Intel and ARM processors, Intel GPUs and NPUs.

Operators are named after the modules they come from, as in "model.layer3.1.fusion.conv/Convolution"; the name of an
operator that belongs to no module, such as those that decode boxes or enlarge logits, starts with "/".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.exporting.graph import Plan
from mobilevit.exporting.onnx import to_proto
from mobilevit.exporting.quantization import is_below
from mobilevit.runtime.artifact import Precision

if TYPE_CHECKING:
    from openvino import Model

_NO_COMPUTATION = ("Constant", "Convert", "Parameter", "Result")


def settings(precision: Precision) -> dict[str, str]:
    """Return the settings that a file needs in the runtime.

    Without a hint, OpenVINO computes in bfloat16 where the processor can, whatever the file holds. In int8, the hint is
    for the layers that stay in floating point: XXS takes 8.8 ms instead of 13 in float32.
    """
    return {"INFERENCE_PRECISION_HINT": "f32" if precision in ("fp32", "fp16") else "bf16"}


def convert(plan: Plan, path: Path) -> None:
    """Write `path` (.xml) and the weights beside it (.bin), with the artifact's description in rt_info."""
    import openvino

    # By way of ONNX, from which OpenVINO makes a slightly faster graph than from PyTorch. In bfloat16, attention in
    # steps would give logits of 33 dB instead of 43, for 2 % of the time.
    in_bfloat16 = plan.artifact.settings.get("INFERENCE_PRECISION_HINT") == "bf16"
    model = openvino.Core().read_model(to_proto(plan, stepwise=not in_bfloat16).SerializeToString())
    if plan.artifact.precision == "int8":
        model = _quantize(model, plan)
    for port, name in zip(model.outputs, plan.graph.output_names, strict=True):
        port.get_tensor().set_names({name})
    model.inputs[0].get_tensor().set_names({plan.graph.input_name})
    model.set_rt_info(plan.artifact.to_json(), ["mobilevit"])
    openvino.save_model(model, path, compress_to_fp16=plan.artifact.precision in ("fp16", "bf16"))


def _quantize(model: Model, plan: Plan) -> Model:
    """Quantize convolutions, linear layers and attention by NNCF.

    The settings were chosen on flowers (864 held out), by the share of images that keep their class, and by the signal
    of the logits over their noise.
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    left = []
    for operator in model.get_ops():
        name = operator.get_friendly_name()
        stays_float = name.startswith("/") or is_below(name.partition("/")[0], plan.in_float)
        if stays_float and operator.get_type_name() not in _NO_COMPUTATION:
            left.append(name)
    images = [batch.numpy() for batch in plan.batches()]
    quantized: Model = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,  # a zero point for SiLU's outputs: 99.2 %; symmetric 98.4 %
        model_type=nncf.ModelType.TRANSFORMER,  # leaves sums and LayerNorm in float: 40 dB; otherwise 39
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=left, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE,  # 7 of 8 bits, for processors without VNNI: costs nothing
            # The default, means over images, cuts off rare values: 21 instead of 27 dB, all in int8.
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            # Off, as it stretches the classifier's few large channels: 40 instead of 30 dB.
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        ),
    )
    return quantized
