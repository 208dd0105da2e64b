"""Core ML, for iPhone, iPad and Mac. Packages are written on any system but run only on Apple's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from mobilevit import __version__
from mobilevit.exporting.graph import ExportGraph, Plan

_PALETTE_BITS = 6
"""Weights are indices into tables of 64 values, one table a layer."""


class _FromPixels(nn.Module):
    """The graph for images as Core ML passes them: values of 0..255. Shape: (B, 3, H, W) -> the graph's outputs."""

    def __init__(self, graph: ExportGraph) -> None:
        super().__init__()
        self.whole = graph  # not `graph`, a name that traced modules need themselves

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.whole.answer(images * self.whole.scale + self.whole.shift)


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, a package for iOS 16, macOS 13 and newer, with the artifact's description in its metadata.

    With preprocessing inside, the input is an image, which Vision and Xcode's preview understand; otherwise an array.
    """
    import coremltools
    from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights

    shape = tuple(plan.example.shape)
    if plan.artifact.baked:
        batch, height, width, _ = shape
        example = plan.example.permute(0, 3, 1, 2).float().contiguous()
        program = replace(plan, example=example).program(_FromPixels(plan.graph))
        source = coremltools.ImageType(
            name=plan.graph.input_name, shape=(batch, 3, height, width), color_layout=coremltools.colorlayout.RGB
        )
    else:
        program = plan.program()
        source = coremltools.TensorType(name=plan.graph.input_name, shape=shape)
    model = coremltools.convert(
        program.run_decompositions({}),
        inputs=[source],
        outputs=[coremltools.TensorType(name=name) for name in plan.graph.output_names],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=getattr(coremltools.precision, "FLOAT32" if plan.artifact.precision == "fp32" else "FLOAT16"),
        skip_model_load=True,
    )
    if plan.artifact.precision == "palettized":
        how = OpPalettizerConfig(mode="kmeans", nbits=_PALETTE_BITS)
        model = palettize_weights(model, OptimizationConfig(global_config=how))
    # The texts that Xcode shows, and the metadata that programs read.
    card = plan.artifact.card
    model.short_description = f"{card.name}, {card.task}, {len(card.classes)} classes"
    model.author = card.provenance.get("author", "")
    model.license = card.provenance.get("license", "")
    model.version = card.provenance.get("version", __version__)
    model.user_defined_metadata["mobilevit"] = plan.artifact.to_json()
    model.user_defined_metadata["classes"] = json.dumps(card.classes, ensure_ascii=False)
    model.save(str(path))
