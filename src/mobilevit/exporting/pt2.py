"""`torch.export` programs: the graph as PyTorch itself keeps it, without Python code or TorchScript."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilevit.exporting.graph import ExportGraph, Plan
from mobilevit.models.mobilevit import Backbone, MobileViT
from mobilevit.models.mobilevitv2 import MobileViTv2
from mobilevit.models.segmenter import Segmenter
from mobilevit.models.ssdlite import DetectionHead


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, with the artifact's description among its extra files."""
    program = plan.program(in_bfloat16(plan.graph) if plan.artifact.precision == "bf16" else None)
    # Every node's stack trace names folders of this machine, and the example image would be a pickle.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    torch.export.save(program, path, extra_files={"mobilevit.json": plan.artifact.to_json()})


def in_bfloat16(graph: ExportGraph) -> ExportGraph:
    """Copy a graph so that it computes in bfloat16, for the same input and float32 outputs.

    PyTorch's kernels for attention, softmax and norms still sum in float32. The last layer computes in float32, because
    its largest outputs often differ by little; so do the decoding of boxes and the enlarging of logits after it.
    """
    graph = copy.deepcopy(graph)
    graph.model.to(torch.bfloat16)
    for module in graph.model.modules():
        if isinstance(module, Backbone):
            module.stem = nn.Sequential(_As(torch.bfloat16), module.stem)  # type: ignore[assignment]
        if isinstance(module, MobileViT | MobileViTv2 | Segmenter):
            module.classifier = nn.Sequential(_As(torch.float32), module.classifier.float())
        elif isinstance(module, DetectionHead):
            module.predict = nn.Sequential(_As(torch.float32), module.predict.float())  # type: ignore[assignment]
    return graph


class _As(nn.Module):
    """The same numbers in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
