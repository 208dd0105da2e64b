"""ONNX, for ONNX Runtime on servers, desktops, phones and in browsers, and for whatever else reads it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mobilevit.exporting.plan import Plan

OPSET = 18
"""The oldest that PyTorch's exporter writes without conversion, and that all maintained runtimes read."""


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, one file with its weights, and the artefact's description in its metadata.

    Raises:
        ValueError: the packages are not installed.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            plan.program(),
            input_names=[plan.graph.input_name],
            output_names=list(plan.graph.output_names),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "mobilevit", plan.artefact.to_json()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
