"""The function that is exported: a fused model from one input tensor to the outputs that a program on a device needs.

Letters used in shape comments:

    B  images in a run     A  anchors     K  classes     H, W  height and width of the input     h, w  of a coarse map
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from mobilevit.card import TaskName, card_of
from mobilevit.models.fuse import fuse
from mobilevit.models.mobilevit import Backbone
from mobilevit.models.segmenter import Segmenter
from mobilevit.models.ssdlite import SSDLite
from mobilevit.runtime.artifact import Artifact


class ExportGraph(nn.Module):
    """A model, fused, as a function from one tensor to a tuple of tensors, named in `output_names`.

    This one is of a classifier, and gives "logits" (B, K).
    """

    input_name: ClassVar[str] = "images"
    output_names: tuple[str, ...] = ("logits",)

    def __init__(self, model: nn.Module, *, baked: bool) -> None:
        super().__init__()
        scaling = card_of(model).preprocessing
        self.model = fuse(model).cpu()
        self.baked = baked
        mean, std = (torch.tensor(values)[:, None, None] for values in (scaling.mean, scaling.std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / (255 * std))  # (3, 1, 1)
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images
        if self.baked:
            x = x.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (B, 3, H, W)
        return self.answer(x)

    def answer(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs for scaled images, (B, 3, H, W)."""
        return (self.model(x),)

    @property
    def size_multiple(self) -> tuple[int, int]:
        """(height, width) of which inputs must be multiples, so that nothing is resized inside."""
        backbone = self.model if isinstance(self.model, Backbone) else self.model.backbone
        return cast(Backbone, backbone).size_multiple

    def example(self, batch_size: int, image_size: tuple[int, int]) -> Tensor:
        """Make an input of the right shape and type, of zeros."""
        if self.baked:
            return torch.zeros(batch_size, *image_size, 3, dtype=torch.uint8)
        return torch.zeros(batch_size, 3, *image_size)


class DetectionGraph(ExportGraph):
    """Gives "boxes_xyxy" (B, A, 4), in 0..1 of the input, and "scores" (B, A, K) without the background."""

    output_names = ("boxes_xyxy", "scores")

    def answer(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast(SSDLite, self.model)(x).named().values())


class SegmentationGraph(ExportGraph):
    """Gives "logits" (B, K, H, W), or "label_map" (B, H, W), uint8: the best class of every pixel."""

    model: Segmenter

    def __init__(self, model: nn.Module, *, baked: bool, image_size: tuple[int, int] | None, label_map: bool) -> None:
        super().__init__(model, baked=baked)
        self.label_map = label_map
        self.output_names = ("label_map",) if label_map else ("logits",)
        self.rows: Tensor | None
        self.columns: Tensor | None
        rows = columns = None
        if image_size is not None:
            rows, columns = (_enlarging(-(-side // self.model.output_stride), side) for side in image_size)
            columns = columns.T.contiguous()
        self.register_buffer("rows", rows)  # (H, h)
        self.register_buffer("columns", columns)  # (w, W)

    def answer(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.rows is None or self.columns is None:
            logits = self.model(x).logits
        else:
            # Bilinear enlargement is linear in rows and in columns. As two products it is exact on every device,
            # where kernels for a resize differ in how they place corners, or are missing.
            logits = self.rows @ (self.model.coarse_logits(x) @ self.columns)  # (B, K, H, W)
        return self.finish(logits)

    def finish(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Turn logits into the graph's output. Shape: (B, K, H, W) -> (B, K, H, W) or (B, H, W)."""
        return (logits.argmax(dim=1).to(torch.uint8) if self.label_map else logits,)


def export_graph(
    model: nn.Module, *, image_size: tuple[int, int] | None, baked: bool = False, label_map: bool = False
) -> ExportGraph:
    """Wrap a model of any task, in evaluation mode and on the CPU.

    Args:
        model: with a card; it stays as it is.
        image_size: (height, width) of the input; None: it may change from run to run.
        baked: take uint8 (B, H, W, 3) and scale inside, instead of scaled float32 (B, 3, H, W).
        label_map: segmentation: give the best class of every pixel instead of logits.
    """
    graphs: dict[TaskName, Callable[..., ExportGraph]] = {
        "classification": ExportGraph,
        "detection": DetectionGraph,
        "segmentation": partial(SegmentationGraph, image_size=image_size, label_map=label_map),
    }
    return graphs[card_of(model).task](model, baked=baked).eval()


def _enlarging(coarse: int, fine: int) -> Tensor:
    """Make the matrix (fine, coarse) that enlarges a line of values bilinearly, ends on ends."""
    lines = torch.eye(coarse, dtype=torch.float64)[None]  # (1, coarse, coarse)
    return F.interpolate(lines, fine, mode="linear", align_corners=True)[0].T.float().contiguous()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One export, as every format module is given it; its `convert(plan, path)` writes the file."""

    graph: ExportGraph
    """In evaluation mode, on the CPU."""
    artifact: Artifact
    """The description of the file; its precision, batch size and image size decide the conversion."""
    example: Tensor
    """An input to trace with, of the artifact's type and layout."""
    calibration: Sequence[Tensor] = ()
    """int8: inputs made of real images, of one image each, otherwise like `example`."""
    in_float: tuple[str, ...] = ()
    """int8: names of modules of the graph that compute in floating point, with all below them."""

    def program(self, module: nn.Module | None = None) -> ExportedProgram:
        """Trace the graph, or another module for the same input, by `torch.export`."""
        shapes: dict[int, Dim] = {}
        if self.artifact.batch_size is None:
            shapes[0] = Dim("batch", min=1, max=1024)
        if self.artifact.image_size is None:
            rows, columns = (1, 2) if self.artifact.baked else (2, 3)
            height, width = self.graph.size_multiple
            shapes[rows] = height * Dim("rows", min=1, max=2048 // height)
            shapes[columns] = width * Dim("columns", min=1, max=2048 // width)
        with torch.no_grad():
            return torch.export.export(
                self.graph if module is None else module,
                (self.example,),
                dynamic_shapes=(shapes,) if shapes else None,
                strict=False,
            )

    def batches(self) -> Iterator[Tensor]:
        """Yield the calibration images at the artifact's own batch size; an incomplete last batch is left out."""
        size = self.artifact.batch_size or 1
        for start in range(0, len(self.calibration) - size + 1, size):
            yield torch.cat(list(self.calibration[start : start + size]))
