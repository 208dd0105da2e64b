"""Weights and images that follow from a rule, so that reference outputs need no weights beside them.

`tests/golden/README.md` has the rule in words. It also suits any other model that a test wants to fill with numbers
that leave no BatchNorm an identity and no bias zero.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden_name(name: str) -> str:
    """How the reference files call a model: mobilevit_xxs, mobilevitv2_0.5."""
    generation, size = name.split("_")
    return f"{generation}_{int(size) / 100}" if size.isdigit() else name


def golden_outputs(task: str) -> dict[str, Tensor]:
    """The reference outputs of all models of both generations for a task."""
    return load_file(GOLDEN / f"cvnets_{task}.safetensors") | load_file(GOLDEN / f"cvnets_v2_{task}.safetensors")


def golden_manifest(task: str = "classification") -> dict[str, dict[str, Any]]:
    """What is known of the reference models of both generations; "state" has the shapes of the weights by name."""
    files = (GOLDEN / f"{file}_{task}_manifest.json" for file in ("cvnets", "cvnets_v2"))
    return {model: entry for file in files for model, entry in json.loads(file.read_text()).items()}


def golden_parameter_counts() -> dict[str, dict[str, int]]:
    """Parameters of MobileViTv2 in the reference code: {model: {form: count}}."""
    counts = json.loads((GOLDEN / "cvnets_v2_parameter_counts.json").read_text())
    return {f"mobilevitv2_{float(width) * 100:03.0f}": forms for width, forms in counts.items()}


def golden_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The state dict that the rule gives for these names and shapes."""
    return {name: _golden_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def fill_with_golden_weights(model: nn.Module) -> nn.Module:
    """Load the rule's weights for the model's own names; the model in eval mode is returned."""
    model.load_state_dict(golden_weights({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model.eval()


def golden_images(count: int, height: int, width: int) -> Tensor:
    """The input of the reference outputs."""
    return torch.from_numpy(np.random.RandomState(0).random_sample((count, 3, height, width)).astype(np.float32))


def _golden_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) if shape else np.zeros(())
    if name.endswith("running_var"):
        values = 1 + 0.1 * abs(r)
    elif name.endswith(("running_mean", "bias")):
        values = 0.1 * r
    elif len(shape) == 1:
        values = 1 + 0.1 * r
    else:
        values = r / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
