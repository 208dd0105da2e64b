"""OpenVINO IR: Intel and ARM processors, Intel GPUs and NPUs."""

from __future__ import annotations

from pathlib import Path

from mobilevit.exporting.plan import Plan


def convert(plan: Plan, path: Path) -> None:
    """Write `path` (.xml) and the weights beside it (.bin), with the artefact's description in rt_info."""
    import openvino

    model = openvino.convert_model(plan.program())
    for port, name in zip(model.outputs, plan.graph.output_names, strict=True):
        port.get_tensor().set_names({name})
    model.inputs[0].get_tensor().set_names({plan.graph.input_name})
    model.set_rt_info(plan.artefact.to_json(), ["mobilevit"])
    openvino.save_model(model, path, compress_to_fp16=plan.artefact.precision in ("fp16", "bf16"))
