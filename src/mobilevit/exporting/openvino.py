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

if TYPE_CHECKING:
    from openvino import Model

_NO_COMPUTATION = ("Constant", "Convert", "Parameter", "Result")


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
    of the logits over their noise:

        ranges        smallest and largest value of all images; NNCF's default, their means over images, cuts off rare
                      values: 21 instead of 27 dB, all in int8
        SmoothQuant   off: 40 instead of 30 dB (it stretches the classifier's input, which has a few large channels)
        model type    transformer leaves sums and LayerNorm in float: 99.5 %, 40 dB instead of 39
        preset        mixed, activations with a zero point, as SiLU's outputs want: 99.2 instead of 98.4 % (symmetric)
        bias          corrected, which makes 98.8 % into 99.2
        overflow      7 of 8 bits in weights, for processors without VNNI: costs nothing (99.8 instead of 99.5 %)
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    left = [
        operator.get_friendly_name()
        for operator in model.get_ops()
        if operator.get_type_name() not in _NO_COMPUTATION
        and (
            operator.get_friendly_name().startswith("/")
            or is_below(operator.get_friendly_name().partition("/")[0], plan.in_float)
        )
    ]
    images = [batch.numpy() for batch in plan.batches()]
    quantized: Model = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=left, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE,
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        ),
    )
    return quantized
