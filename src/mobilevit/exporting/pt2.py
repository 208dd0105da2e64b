"""`torch.export` programs: the graph as PyTorch itself keeps it, without Python code and without TorchScript."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.plan import Plan
from mobilevit.models.deeplabv3 import DeepLabv3
from mobilevit.models.mobilevit import MobileViT, MobileViTBackbone
from mobilevit.models.ssdlite import DetectionHead

DESCRIPTION = "mobilevit.json"
"""Name of the extra file that says what the program is."""


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, with the artifact's description among its extra files."""
    program = plan.program(in_bfloat16(plan.graph) if plan.artifact.precision == "bf16" else None)
    # Without the folders of this machine, which stand in every node's stack trace, and without an example image,
    # which is a pickle.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    torch.export.save(program, path, extra_files={DESCRIPTION: plan.artifact.to_json()})


def in_bfloat16(graph: ExportGraph) -> ExportGraph:
    """A copy that computes in bfloat16, for the same input and float32 outputs.

    Attention and LayerNorm sum in float32 all the same, as PyTorch's kernels do. The last layer computes in float32:
    of its outputs, those that matter differ little. So do what follows it, decoding boxes and enlarging logits.
    """
    graph = copy.deepcopy(graph)
    graph.model.to(torch.bfloat16)
    for module in graph.model.modules():
        if isinstance(module, MobileViTBackbone):
            module.stem = nn.Sequential(_As(torch.bfloat16), module.stem)  # type: ignore[assignment]
        if isinstance(module, MobileViT | DeepLabv3):
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
