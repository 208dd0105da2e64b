"""`torch.export` programs: the graph as PyTorch itself keeps it, without Python code and without TorchScript."""

from __future__ import annotations

from pathlib import Path

import torch

from mobilevit.exporting.plan import Plan


def convert(plan: Plan, path: Path) -> None:
    """Write `path`, with the artefact's description among its extra files."""
    torch.export.save(plan.program(), path, extra_files={"mobilevit.json": plan.artefact.to_json()})
