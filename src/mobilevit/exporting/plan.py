"""What every format module is given: the graph, an input to trace it with, and how it is to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mobilevit.exporting.graph import ExportGraph
from mobilevit.runtime.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One export; `convert(plan, path)` of a format module writes the file."""

    graph: ExportGraph
    """In eval mode, on the CPU."""
    artifact: Artifact
    """What the file will say of itself; its precision, batch size and image size decide the conversion."""
    example: Tensor
    """An input to trace with, of the artifact's type and layout."""
    calibration: Sequence[Tensor] = ()
    """int8: inputs made of real images, of one image each, as `example` otherwise."""
    keep_float: tuple[str, ...] = ()
    """int8: names of modules of the graph whose computation stays in floating point, with all below them."""

    def program(self, module: torch.nn.Module | None = None) -> ExportedProgram:
        """The graph, or another module for the same input, through `torch.export`."""
        with torch.no_grad():
            return torch.export.export(
                self.graph if module is None else module,
                (self.example,),
                dynamic_shapes=self.dynamic_shapes() or None,
                strict=False,
            )

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...] | None:
        """Of the input, for `torch.export`; None: all static."""
        shapes: dict[int, Any] = {}
        if self.artifact.batch_size is None:
            shapes[0] = Dim("batch", min=1, max=1024)
        if self.artifact.image_size is None:
            rows, columns = (1, 2) if self.artifact.baked else (2, 3)
            height, width = self.graph.size_multiple
            shapes[rows] = height * Dim("rows", min=1, max=2048 // height)
            shapes[columns] = width * Dim("columns", min=1, max=2048 // width)
        return (shapes,) if shapes else None

    def batches(self) -> Iterator[Tensor]:
        """Calibration images at the artifact's own batch size; a last batch that is not full is left out."""
        size = self.artifact.batch_size or 1
        for start in range(0, len(self.calibration) - size + 1, size):
            yield torch.cat(list(self.calibration[start : start + size]))
