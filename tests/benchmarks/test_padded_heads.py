from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.models.mobilevit import Attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from padded_heads import pad_heads


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"])
def test_wider_heads_of_zeros_change_nothing(name: str) -> None:
    fused = mobilevit.fuse(fill_with_golden_weights(mobilevit.create_model(name, num_classes=7)))
    padded = pad_heads(fused)
    widths = [module.head_dim for module in padded.modules() if isinstance(module, Attention)]
    assert len(widths) == 9
    assert all(width % 8 == 0 for width in widths)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(padded(x), fused(x), atol=1e-5)
